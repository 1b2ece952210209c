"""The plan: what it promises is what its noise keeps, and it says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.sampling import PoissonSampler
from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import epsilon
from fedtune.privacy.plan import PrivacyPlan, default_delta, delta_warning, public_count

TERMS = {"delta": 1e-5, "clip_norm": 0.5, "sampling_rate": 0.2, "max_steps": 40}


@pytest.fixture
def plan() -> PrivacyPlan:
    return PrivacyPlan.calibrated(epsilon=4.0, noise="secure", **TERMS)


def test_the_forecast_is_the_epsilon_of_the_events_that_will_run(plan: PrivacyPlan) -> None:
    rounds = [plan.event(10) for _ in range(4)]
    assert plan.forecast() == epsilon(rounds, plan.delta) <= 4.0
    assert plan.forecast() == pytest.approx(4.0, rel=2e-3)


def test_spending_grows_from_zero_to_the_forecast(plan: PrivacyPlan) -> None:
    spent = [plan.spent(steps) for steps in (0, 1, 20, 40)]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert spent[-1] == plan.forecast()


def test_the_accounted_event_repeats_the_plan(plan: PrivacyPlan) -> None:
    event = plan.event(7)
    assert (event.noise_multiplier, event.sampling_rate, event.steps, event.clip_norm, event.noise) == (
        plan.noise_multiplier,
        0.2,
        7,
        0.5,
        "secure",
    )
    assert PoissonSampler(100, plan.sampling_rate).rate == event.sampling_rate


def test_a_given_noise_multiplier_determines_epsilon() -> None:
    plan = PrivacyPlan.from_noise(noise_multiplier=2.0, **TERMS)
    assert plan.epsilon == plan.forecast()
    plan.check()


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 0.5}, {"sampling_rate": 0.9}, {"max_steps": 400}, {"epsilon": 1.0}]
)
def test_a_plan_that_promises_more_than_its_noise_keeps_is_refused(plan: PrivacyPlan, change: dict[str, Any]) -> None:
    plan.check()
    with pytest.raises(PrivacyError, match="overspends"):
        replace(plan, **change).check()


def test_a_plan_survives_json(plan: PrivacyPlan) -> None:
    for one in (plan, plan.about("patient_id", 8), PrivacyPlan.off(sampling_rate=0.1, max_steps=3)):
        assert PrivacyPlan.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False))) == one


def test_a_plan_with_an_unknown_or_missing_key_is_refused(plan: PrivacyPlan) -> None:
    with pytest.raises(PrivacyError, match="privacy plan"):
        PrivacyPlan.from_dict({**plan.to_dict(), "trust": "me"})
    with pytest.raises(PrivacyError, match="privacy plan"):
        PrivacyPlan.from_dict({"mode": "dp"})


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "none"},
        {"mode": "off"},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"noise_multiplier": 0.0},
        {"sampling_rate": "all"},
        {"max_steps": None},
        {"sampler": "fixed-size"},
        {"sampler": "shuffle", "sampling_rate": 0.3},
        {"unit": ""},
        {"unit": "patient_id"},
        {"unit": "patient_id", "max_records_per_unit": 0},
        {"unit": "patient_id", "max_records_per_unit": "8"},
        {"max_records_per_unit": 8},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_when_it_is_read(plan: PrivacyPlan, change: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError):
        PrivacyPlan.from_dict({**plan.to_dict(), **change})


def test_the_statement_names_every_term_of_the_promise(plan: PrivacyPlan) -> None:
    for term in (
        "ε = 4",
        "δ = 1e-05",
        "record",
        "added to or removed",
        "Poisson",
        "PLD",
        "cryptographic",
        "not protected",
    ):
        assert term in plan.statement
    assert "not for release" in replace(plan, noise="seeded").statement


def test_a_promise_about_a_group_says_which_records_are_one_unit_and_how_many_a_step_uses(plan: PrivacyPlan) -> None:
    about = plan.about("patient_id", 8)
    one_unit = "one unit (all records with the same patient_id, of which at most 8 are used in a step)"
    assert about.one_unit == one_unit
    assert f"for {one_unit} added to or removed from a site" in about.statement
    assert "rounded number of units" in about.statement
    assert about.event(1).unit == "patient_id"
    assert (about.noise_multiplier, about.forecast()) == (plan.noise_multiplier, plan.forecast())
    assert about.about("record", 8) == plan.about("record", 3) == plan
    assert plan.one_unit == "one record"


def test_without_privacy_every_number_and_the_statement_say_so() -> None:
    plan = PrivacyPlan.off(sampling_rate=0.1, max_steps=3)
    plan.check()
    assert plan.epsilon == plan.forecast() == epsilon([plan.event(1)], 1e-5) == math.inf
    assert "NOT PRIVATE" in plan.statement


@given(st.integers(2, 10**9))
def test_the_default_delta_is_below_one_over_n_and_never_warns(units: int) -> None:
    assert default_delta(units) < 1 / units
    assert delta_warning(default_delta(units), units) is None


def test_a_delta_of_one_over_n_is_warned_about_with_the_reason() -> None:
    assert "publishes 1 of the records" in (delta_warning(0.001, 1000) or "")
    assert "publishes 10 of the units" in (delta_warning(0.01, 1000, "unit") or "")


@pytest.mark.parametrize("units", [0, 1])
def test_no_default_delta_exists_for_a_site_of_one(units: int) -> None:
    with pytest.raises(PrivacyError, match="too-few-units"):
        default_delta(units)


@given(st.integers(0, 10**12))
def test_a_public_count_has_two_significant_digits_and_is_close(units: int) -> None:
    shown = public_count(units)
    assert len(str(shown).rstrip("0")) <= 2
    assert abs(shown - units) <= 0.05 * units


def test_one_record_rarely_changes_the_public_count() -> None:
    changes = sum(public_count(n) != public_count(n + 1) for n in range(1000, 10_000))
    assert changes == 90


def test_the_denominator_uses_the_public_count(plan: PrivacyPlan) -> None:
    assert plan.expected_batch(1234) == plan.expected_batch(1233) == pytest.approx(0.2 * 1200)
