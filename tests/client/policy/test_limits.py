"""Of plan and policy the stricter holds, and a simulation's own policy allows its plan and no other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.plan import StudyPlan
from fedtune.errors import PolicyError
from fedtune.privacy.plan import PrivacyPlan
from fedtune_client.policy.limits import Limits, caps, simulation_policy
from fedtune_client.policy.rules import judge
from fedtune_client.policy.schema import Policy
from tests.client.policy.conftest import MakePlan, MakePolicy, placed, plan_text, policy_tree

epsilons = st.floats(0, 1e6)
deltas = st.floats(1e-12, 0.5)


@given(asked=epsilons, asked_delta=deltas, study=epsilons, lifetime=epsilons, delta=deltas)
def test_limits_are_never_above_plan_or_policy(
    asked: float, asked_delta: float, study: float, lifetime: float, delta: float
) -> None:
    plan = StudyPlan.from_json(plan_text(privacy__epsilon=asked, privacy__delta=asked_delta))
    changes = {"privacy.study_epsilon": study, "privacy.delta": delta, "data.claims.lifetime_epsilon": lifetime}
    limits = caps(plan, Policy.model_validate(placed(policy_tree(), changes)), "claims")
    assert limits.study_epsilon == min(asked, study)
    assert limits.study_delta == min(asked_delta, delta)
    assert (limits.lifetime_epsilon, limits.lifetime_delta) == (lifetime, delta)


def test_a_data_set_that_the_policy_does_not_name_has_no_limits(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    with pytest.raises(PolicyError, match="unknown-data"):
        caps(make_plan(), make_policy(), "scans")


def test_a_study_without_privacy_is_limited_by_the_policy_alone(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    plan = make_plan(privacy=PrivacyPlan.off(sampling_rate=0.1, max_steps=100).to_dict())
    assert caps(plan, make_policy(), "claims") == Limits(3.0, 1e-6, 3.0, 1e-6)


PLANS = [
    {},
    {"privacy": PrivacyPlan.off(sampling_rate=0.1, max_steps=100).to_dict()},
    {"privacy__unit": "record", "privacy__max_records_per_unit": None, "privacy__noise": "seeded"},
    {"evaluation__site_metrics": "noisy", "privacy__evaluations": 3, "privacy__evaluation_noise_multiplier": 0.5},
    {"evaluation__site_metrics": "clear", "lora__targets": "all-linear", "federation__sites": 1},
    {"data__partition__scheme": "column", "data__partition__column": "bank", "data__max_tokens": 100_000},
]


@pytest.mark.parametrize("changes", PLANS)
def test_the_simulation_policy_allows_what_its_plan_asks_and_says_so(
    make_plan: MakePlan, changes: dict[str, Any]
) -> None:
    plan = make_plan(**changes)
    policy = simulation_policy(plan)
    assert judge(plan, policy, approved=False, units=1) == ()
    assert "simulation" in policy.name
    assert Policy.from_canonical(policy.canonical) == policy
    limits = caps(plan, policy, plan.data.name)
    if plan.promise.mode == "dp":
        assert limits.study_epsilon == limits.lifetime_epsilon == plan.promise.epsilon
        assert limits.study_delta == limits.lifetime_delta == plan.promise.delta


def test_the_simulation_policy_allows_no_more_than_its_plan(make_plan: MakePlan) -> None:
    policy = simulation_policy(make_plan())
    larger = make_plan(lora__rank=9, federation__rounds=21, privacy__epsilon=3.1, data__max_tokens=129)
    found = {reason.code.removeprefix("policy.") for reason in judge(larger, policy, approved=False, units=1)}
    assert found == {"rank", "rounds", "total-steps", "study-epsilon", "lifetime-epsilon", "max-tokens"}
