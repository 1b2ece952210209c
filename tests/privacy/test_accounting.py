"""ε against published formulas, measured tables and two other accountants."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import Event, epsilon, merge, pld_epsilon

if TYPE_CHECKING:
    import random


def event(sigma: float = 1.0, rate: float = 0.1, steps: int = 10, **changes: Any) -> Event:
    return Event(sigma, rate, steps, clip_norm=1.0, **changes)


def analytic_gaussian_delta(eps: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8, for sensitivity / standard deviation = mu."""
    return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)


TABLE = [
    ((1.0, 0.01, 1000), 1e-5, {"rdp": 2.101, "prv": 1.838, "pld": 1.828}),
    ((0.6, 1e-4, 30_000), 1e-7, {"rdp": 2.586, "prv": 1.151, "pld": 1.141}),
    ((1.0, 1.0, 10), 1e-5, {"rdp": 19.05, "prv": 17.87, "pld": 17.86}),
]


@pytest.mark.parametrize(("mechanism", "delta", "known"), TABLE)
def test_all_three_accountants_give_their_known_values(mechanism: Any, delta: float, known: dict[str, float]) -> None:
    for accountant, expected in known.items():
        assert epsilon([event(*mechanism)], delta, accountant) == pytest.approx(
            expected, abs=6e-3 if expected > 9 else 6e-4
        )


@pytest.mark.parametrize(
    "mechanism", [(0.7, 0.1, 30), (1.2, 0.3, 50), (4.0, 0.5, 100), (2.0, 1.0, 20), (0.9, 0.02, 400)]
)
def test_pld_is_the_tightest_and_agrees_with_prv_within_its_error(mechanism: Any) -> None:
    pld, prv, rdp = (epsilon([event(*mechanism)], 1e-5, name) for name in ("pld", "prv", "rdp"))
    assert pld <= rdp
    assert abs(pld - prv) <= 0.01 + 2e-4 * pld  # PRV reports its upper end, 0.01 above


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (3.0, 30), (0.5, 4), (50.0, 1000)])
def test_full_batches_have_the_analytic_gaussian_epsilon(sigma: float, steps: int) -> None:
    eps = epsilon([event(sigma, 1.0, steps)], 1e-5)
    assert analytic_gaussian_delta(eps, math.sqrt(steps) / sigma) == pytest.approx(1e-5, rel=1e-6)


def test_gaussians_of_different_noise_compose_into_one() -> None:
    parts = [event(2.0, 1.0, 3), event(5.0, 1.0, 7)]
    whole = event((3 / 4 + 7 / 25) ** -0.5, 1.0, 1)
    assert epsilon(parts, 1e-6) == pytest.approx(epsilon([whole], 1e-6), rel=1e-12)


def test_a_mixed_history_lies_between_its_neighbours() -> None:
    mixed = epsilon([event(1.0, 0.1, 20), event(4.0, 1.0, 5)], 1e-5)
    assert epsilon([event(1.0, 0.1, 20)], 1e-5) < mixed < epsilon([event(1.0, 0.1, 20), event(2.0, 1.0, 5)], 1e-5)
    assert abs(mixed - epsilon([event(1.0, 0.1, 20), event(4.0, 1.0, 5)], 1e-5, "prv")) <= 0.01 + 1e-3


@pytest.mark.parametrize("mechanism", [(0.8, 1e-3, 100), (1.0, 0.1, 100), (50.0, 0.5, 10_000)])
def test_the_grid_overstates_epsilon_by_no_more_than_it_says(mechanism: Any) -> None:
    coarse, fine = (pld_epsilon((mechanism,), 1e-5, pessimism) for pessimism in (1e-4, 1e-6))
    assert fine <= coarse * (1 + 1e-6)
    assert coarse <= fine * (1 + 3e-3)


def test_a_tiny_noise_is_accounted_without_exhausting_the_memory() -> None:
    assert epsilon([event(0.05, 0.5, 1000)], 1e-5) > 1e4


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon([], 1e-5) == 0
    assert epsilon([event(steps=0)], 1e-5) == 0
    for accountant in ("pld", "rdp", "prv"):
        assert epsilon([event(0.0), event(3.0)], 1e-5, accountant) == math.inf


HISTORY = st.lists(
    st.builds(event, st.sampled_from([0.8, 1.5, 3.0]), st.sampled_from([0.05, 0.2, 1.0]), st.integers(0, 40)),
    max_size=5,
)


@settings(max_examples=10, deadline=None)
@given(history=HISTORY, seed=st.randoms(use_true_random=False))
def test_the_order_of_events_does_not_matter(history: list[Event], seed: random.Random) -> None:
    shuffled = list(history)
    seed.shuffle(shuffled)
    assert merge(shuffled) == merge(history)
    assert epsilon(shuffled, 1e-5) == epsilon(merge(history), 1e-5)


@settings(max_examples=10, deadline=None)
@given(history=HISTORY, extra=HISTORY)
def test_more_events_never_spend_less(history: list[Event], extra: Any) -> None:
    assert epsilon(history + extra, 1e-5) >= epsilon(history, 1e-5) * (1 - 1e-3)


def test_four_hundred_alternating_steps_are_two_merged_events() -> None:
    steps = [event(sigma, 0.01, 1) for _ in range(200) for sigma in (1.0, 1.3)]
    assert [one.steps for one in merge(steps)] == [200, 200]
    assert epsilon(steps, 1e-5) == epsilon([event(1.0, 0.01, 200), event(1.3, 0.01, 200)], 1e-5)


def test_events_that_differ_in_more_than_steps_stay_apart_in_the_ledger_and_join_in_the_composition() -> None:
    seeded, secure = event(steps=3), event(steps=3, noise="secure")
    assert len(merge([seeded, secure])) == 2
    assert epsilon([seeded, secure], 1e-5) == epsilon([event(steps=6)], 1e-5)


def test_an_event_survives_json() -> None:
    original = event(noise="secure", unit="patient")
    assert Event.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_an_event_with_a_missing_or_unknown_key_is_refused() -> None:
    values = event().to_dict()
    with pytest.raises(PrivacyError, match="event"):
        Event.from_dict({**values, "shuffle": True})
    values.pop("steps")
    with pytest.raises(PrivacyError, match="event"):
        Event.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "fixed-size"},
        {"sampler": "shuffle", "rate": 0.1, "steps": 5},
        {"relation": "replace one"},
        {"noise": "none"},
        {"sigma": -1.0},
        {"sigma": math.nan},
        {"rate": 0.0},
        {"rate": 1.1},
        {"steps": -1},
        {"steps": 2.5},
    ],
)
def test_an_event_that_no_accountant_covers_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="cannot be"):
        event(**change)


def test_a_shuffled_event_at_a_rate_that_divides_no_epoch_is_refused() -> None:
    with pytest.raises(PrivacyError, match="epoch"):
        event(sampler="shuffle", rate=0.3)


@pytest.mark.parametrize("change", [{"steps": "7"}, {"noise_multiplier": None}, {"sampling_rate": [1]}])
def test_an_event_with_a_value_of_another_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="event"):
        Event.from_dict({**event().to_dict(), **change})


def test_what_cannot_be_accounted_is_refused() -> None:
    with pytest.raises(PrivacyError, match="mixed-units"):
        epsilon([event(), event(unit="patient")], 1e-5)
    with pytest.raises(PrivacyError, match="unknown-accountant"):
        epsilon([event()], 1e-5, "gdp")
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(PrivacyError, match="delta"):
            epsilon([event()], delta)
