"""The noise multiplier keeps the promise, wastes little, and moves the right way."""

from __future__ import annotations

import math

import pytest

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import Event, epsilon
from fedtune.privacy.calibration import calibrate

SETTINGS = [
    (8.0, 1e-5, 0.1, 30),
    (3.0, 1e-5, 1.0, 20),
    (1.0, 1e-6, 0.5, 100),
    (0.1, 1e-5, 0.1, 100),
    (2.0, 1e-5, 0.05, 300),
    (100.0, 1e-5, 0.1, 10),
]


@pytest.mark.parametrize(("target", "delta", "rate", "steps"), SETTINGS)
def test_the_noise_is_enough_and_a_thousandth_less_is_not(target: float, delta: float, rate: float, steps: int) -> None:
    sigma = calibrate(target, delta, rate, steps)
    assert epsilon([Event(sigma, rate, steps, 1.0)], delta) <= target
    assert epsilon([Event(sigma / 1.001, rate, steps, 1.0)], delta) > target


@pytest.mark.parametrize(("target", "delta", "rate", "steps"), SETTINGS)
def test_the_other_accountants_confirm_the_promise(target: float, delta: float, rate: float, steps: int) -> None:
    event = Event(calibrate(target, delta, rate, steps), rate, steps, 1.0)
    assert epsilon([event], delta, "rdp") >= target * 0.99
    if target < 10:
        assert epsilon([event], delta, "prv") == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize(("target", "rate", "steps"), [(0.5, 0.2, 100), (8.0, 0.6, 20), (2.0, 1.0, 7)])
def test_a_weaker_promise_less_sampling_or_fewer_steps_never_need_more_noise(
    target: float, rate: float, steps: int
) -> None:
    most = calibrate(target, 1e-5, rate, steps) * (1 + 1e-3)
    assert calibrate(2 * target, 1e-5, rate, steps) <= most
    assert calibrate(target, 1e-4, rate, steps) <= most
    assert calibrate(target, 1e-5, rate / 2, steps) <= most
    assert calibrate(target, 1e-5, rate, steps // 2) <= most


def test_a_very_weak_promise_keeps_the_least_noise() -> None:
    assert calibrate(1e6, 1e-5, 0.1, 10) == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((0.0, 1e-5, 0.1, 10), "privacy.epsilon"),
        ((-1.0, 1e-5, 0.1, 10), "privacy.epsilon"),
        ((math.inf, 1e-5, 0.1, 10), "privacy.epsilon"),
        ((math.nan, 1e-5, 0.1, 10), "privacy.epsilon"),
        ((1.0, 0.0, 0.1, 10), "privacy.delta"),
        ((1.0, 1.0, 0.1, 10), "privacy.delta"),
        ((1.0, 1e-5, 0.0, 10), "privacy.sampling-rate"),
        ((1.0, 1e-5, 1.5, 10), "privacy.sampling-rate"),
        ((1.0, 1e-5, 0.1, 0), "privacy.steps"),
        ((1e-6, 1e-9, 1.0, 10), "privacy.unreachable"),
        ((1e-5, 1e-12, 0.5, 100_000), "privacy.unreachable"),
    ],
)
def test_a_promise_that_cannot_be_kept_is_refused_with_its_reason(
    arguments: tuple[float, float, float, int], code: str
) -> None:
    with pytest.raises(PrivacyError) as refusal:
        calibrate(*arguments)
    assert refusal.value.code == code
