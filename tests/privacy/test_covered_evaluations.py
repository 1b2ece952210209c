"""A plan's ε covers its noisy evaluations besides its training, by whoever's accountant."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import epsilon
from fedtune.privacy.calibration import calibrate, noise_of_share
from fedtune.privacy.plan import PrivacyPlan

DELTA = 1e-5
TERMS: dict[str, Any] = {"delta": DELTA, "clip_norm": 0.5, "max_steps": 40}
RATES = [0.1, 1.0]


def measuring(epsilon: float, rate: float, share: float = 0.05, evaluations: int = 9, **terms: Any) -> PrivacyPlan:
    sigma = noise_of_share(epsilon, DELTA, share, evaluations)
    covered = {"evaluations": evaluations, "evaluation_noise_multiplier": sigma}
    return PrivacyPlan.calibrated(epsilon=epsilon, sampling_rate=rate, **TERMS, **covered, **terms)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_the_promise_covers_training_and_evaluations_together(target: float, rate: float) -> None:
    plan = measuring(target, rate)
    plan.check()
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(plan.noise_multiplier))
    both = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(step, 40),
            dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(plan.evaluation_noise_multiplier), 9),
        ]
    )
    independent = PLDAccountant(value_discretization_interval=1e-3).compose(both).get_epsilon(DELTA)
    assert independent == pytest.approx(target, rel=5e-3)
    assert plan.forecast() == epsilon([plan.event(40), plan.evaluation_event(9)], DELTA) <= target
    assert plan.forecast() == pytest.approx(target, rel=3e-3)


@pytest.mark.parametrize("rate", RATES)
def test_training_alone_has_more_noise_than_it_would_need(rate: float) -> None:
    with_metrics, without = measuring(8.0, rate), PrivacyPlan.calibrated(epsilon=8.0, sampling_rate=rate, **TERMS)
    assert without.noise_multiplier < with_metrics.noise_multiplier < 1.1 * without.noise_multiplier
    assert with_metrics.spent(40) < with_metrics.forecast()
    assert with_metrics.spent(0, 9) > with_metrics.spent(0, 1) > 0


@pytest.mark.parametrize("evaluations", [1, 9, 101])
def test_the_share_is_what_all_evaluations_use_of_the_precision(evaluations: int) -> None:
    """So measuring more often adds noise to each measurement and costs training no more."""
    with_metrics, without = (
        measuring(8.0, 1.0, 0.05, evaluations),
        PrivacyPlan.calibrated(epsilon=8.0, sampling_rate=1.0, **TERMS),
    )
    assert with_metrics.noise_multiplier / without.noise_multiplier == pytest.approx(0.95**-0.5, rel=2e-3)


def test_shuffled_training_is_composed_with_evaluations_too() -> None:
    plan = measuring(8.0, 0.1, sampler="shuffle")
    assert plan.forecast() == epsilon([plan.event(40), plan.evaluation_event(9)], DELTA) <= 8.0


def test_a_given_noise_multiplier_pays_for_evaluations_with_epsilon() -> None:
    terms = {**TERMS, "sampling_rate": 0.1, "noise_multiplier": 1.0}
    plan = PrivacyPlan.from_noise(**terms, evaluations=9, evaluation_noise_multiplier=8.0)
    plan.check()
    assert plan.epsilon == plan.forecast() > PrivacyPlan.from_noise(**terms).epsilon


@pytest.mark.parametrize("change", [{"evaluations": 200}, {"evaluation_noise_multiplier": 1.0}])
def test_a_plan_whose_evaluations_are_not_covered_is_refused(change: dict[str, Any]) -> None:
    plan = measuring(8.0, 0.1)
    with pytest.raises(PrivacyError, match="overspends"):
        replace(plan, **change).check()


def test_evaluations_put_into_a_plan_that_was_calibrated_without_are_refused() -> None:
    plan = PrivacyPlan.calibrated(epsilon=8.0, sampling_rate=0.1, **TERMS)
    with pytest.raises(PrivacyError, match="overspends"):
        replace(plan, evaluations=9, evaluation_noise_multiplier=6.0).check()


@pytest.mark.parametrize(
    "change",
    [
        {"evaluations": 0},
        {"evaluations": -1},
        {"evaluations": 2.5},
        {"evaluations": "9"},
        {"evaluation_noise_multiplier": 0.0},
        {"evaluation_noise_multiplier": math.nan},
        {"evaluation_noise_multiplier": "6"},
        {"mode": "off", "epsilon": None, "delta": 0.0, "noise_multiplier": 0.0},
    ],
)
def test_a_plan_whose_evaluations_make_no_sense_is_refused_when_it_is_read(change: dict[str, Any]) -> None:
    values = measuring(8.0, 0.1).to_dict()
    assert PrivacyPlan.from_dict(values).to_dict() == values
    with pytest.raises(PrivacyError):
        PrivacyPlan.from_dict({**values, **change})


def test_an_evaluation_is_charged_for_the_plans_unit_and_source() -> None:
    event = measuring(8.0, 0.1, noise="secure").about("patient_id", 4).evaluation_event()
    assert (event.unit, event.noise, event.sampling_rate, event.steps) == ("patient_id", "secure", 1.0, 1)


def test_the_statement_names_the_evaluations_and_no_longer_excludes_metrics() -> None:
    plain, covered = PrivacyPlan.calibrated(epsilon=8.0, sampling_rate=0.1, **TERMS).statement, measuring(8.0, 0.1)
    assert "held-out metrics" in plain
    assert "9 evaluations at noise multiplier" in covered.statement
    assert "held-out metrics" not in covered.statement


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(PrivacyError, match="share"):
        noise_of_share(8.0, DELTA, share, 9)


def test_metrics_that_use_up_the_promise_leave_nothing_to_train_with() -> None:
    with pytest.raises(PrivacyError, match="unreachable"):
        calibrate(1.0, DELTA, 1.0, 40, ((1.0, 1.0, 9),))
