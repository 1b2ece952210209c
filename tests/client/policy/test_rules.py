"""Each rule lets a plan just inside pass and refuses one just outside, and all reasons are given at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from fedtune.privacy.plan import PrivacyPlan
from fedtune_client.policy.rules import RULES, judge
from tests.client.policy.conftest import MakePlan, MakePolicy

if TYPE_CHECKING:
    from fedtune.config.plan import StudyPlan
    from fedtune_client.policy.schema import Policy

# The fixtures' plan is exactly at every limit of the fixtures' policy. Each line takes it out by one step:
# code, what is changed of the plan, what is found, what is allowed.
OUTSIDE: list[tuple[str, dict[str, Any], str, str]] = [
    ("base-model", {"model__sha256": "ac" + "ab" * 31}, "ac" + "ab" * 31, "tiny"),
    ("data-set", {"data__name": "scans"}, "scans", "claims"),
    ("purpose", {"purpose": "marketing"}, "marketing", "research"),
    ("columns", {"data__task__columns__text": "diary"}, "diary", "category, note, patient_id"),
    ("columns", {"data__partition__column": "ward"}, "ward", "category, note, patient_id"),
    ("noise-floor", {"privacy__noise_multiplier": 0.9999}, "0.9999", "at least 1"),
    ("seeded-noise", {"privacy__noise": "seeded"}, "seeded", "secure"),
    ("delta", {"privacy__delta": 1.01e-6}, "1.01e-06", "at most 1e-06"),
    ("clip-norm", {"privacy__clip_norm": 1.01}, "1.01", "1 to 1"),
    ("clip-norm", {"privacy__clip_norm": 0.99}, "0.99", "1 to 1"),
    ("local-steps", {"training__local_steps": 6, "federation__rounds": 16}, "6", "at most 5"),
    ("total-steps", {"privacy__max_steps": 101}, "101", "at most 100"),
    ("max-tokens", {"data__max_tokens": 129}, "129", "at most 128"),
    ("rank", {"lora__rank": 9}, "9", "at most 8"),
    ("targets", {"lora__targets": ["q_proj", "k_proj"]}, "k_proj", "q_proj, v_proj"),
    ("targets", {"lora__targets": "all-linear"}, "all-linear", "q_proj, v_proj"),
    ("targets", {"lora__targets": "auto"}, "auto", "q_proj, v_proj"),
    ("targets", {"lora__targets": []}, "none", "q_proj, v_proj"),
    ("upload-bytes", {"adapter__upload_bytes": 404}, "404", "at most 400"),
    ("site-metrics", {"evaluation__site_metrics": "coarse"}, "coarse", "off"),
]


def codes(plan: StudyPlan, policy: Policy, *, approved: bool = True, units: int | None = 100) -> list[str]:
    return [reason.code.removeprefix("policy.") for reason in judge(plan, policy, approved=approved, units=units)]


def test_a_plan_exactly_at_every_limit_is_inside(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    assert judge(make_plan(), make_policy(), approved=True, units=100) == ()


@pytest.mark.parametrize(("code", "changes", "found", "allowed"), OUTSIDE)
def test_one_step_outside_gives_one_reason_with_what_was_found_and_what_is_allowed(
    make_plan: MakePlan, make_policy: MakePolicy, code: str, changes: dict[str, Any], found: str, allowed: str
) -> None:
    (reason,) = judge(make_plan(**changes), make_policy(), approved=True, units=100)
    assert (reason.code, reason.found, reason.allowed) == (f"policy.{code}", found, allowed)
    assert found in reason.text
    assert allowed in reason.text


def test_every_rule_has_a_test_that_breaks_it_alone() -> None:
    elsewhere = {"unit", "few-units", "task", "privacy-off", "evaluation-noise", "study-epsilon", "lifetime-epsilon"}
    elsewhere |= {"rounds", "sites", "sites-per-round", "secure-aggregation", "not-approved"}
    tested = {code for code, *_ in OUTSIDE} | elsewhere
    assert tested == {rule.__name__.replace("_", "-") for rule in RULES}


def test_a_plan_that_breaks_five_rules_gets_five_reasons(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    plan = make_plan(
        privacy__noise_multiplier=0.5,
        privacy__delta=1e-3,
        purpose="marketing",
        lora__rank=64,
        evaluation__site_metrics="clear",
    )
    assert codes(plan, make_policy()) == ["purpose", "noise-floor", "delta", "rank", "site-metrics"]


def test_a_policy_that_requires_secure_aggregation_refuses_every_plan(
    make_plan: MakePlan, make_policy: MakePolicy
) -> None:
    assert codes(make_plan(), make_policy(federation__require_secure_aggregation=True)) == ["secure-aggregation"]


def test_a_unit_that_is_not_allowed_is_refused(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    per_record = {"privacy__unit": "record", "privacy__max_records_per_unit": None}
    assert codes(make_plan(**per_record), make_policy()) == ["unit"]
    assert codes(make_plan(**per_record), make_policy(data__claims__units=["patient_id", "record"])) == []


def test_a_column_called_record_is_a_column(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    plan = make_plan(data__task__columns__text="record", privacy__unit="record", privacy__max_records_per_unit=None)
    assert codes(plan, make_policy(data__claims__units="record")) == ["columns"]


def test_another_task_is_refused(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    task = {"style": "text", "columns": {"text": "note"}, "labels": []}
    plan = make_plan(data__task=task, model__head="none")
    assert codes(plan, make_policy()) == ["task"]
    assert codes(plan, make_policy(tasks=["causal-lm"])) == []


@pytest.mark.parametrize(("units", "refused"), [(100, False), (99, True), (None, True), (0, True)])
def test_a_data_set_with_too_few_units_takes_no_part(
    make_plan: MakePlan, make_policy: MakePolicy, units: int | None, refused: bool
) -> None:
    assert codes(make_plan(), make_policy(), units=units) == (["few-units"] if refused else [])


def test_only_the_rounded_number_of_units_is_judged(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    policy = make_policy(data__claims__min_units=1230)
    assert codes(make_plan(), policy, units=1234) == ["few-units"]
    (reason,) = judge(make_plan(), policy, approved=True, units=1234)
    assert "1234" not in reason.found + reason.text
    assert reason.found == "1,200"


def test_no_approval_is_needed_only_where_the_policy_says_so(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    assert codes(make_plan(), make_policy(), approved=False) == ["not-approved"]
    assert codes(make_plan(), make_policy(require_approval=False), approved=False) == []


def test_a_study_above_the_epsilon_of_one_study_is_refused(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    policy = make_policy(privacy__study_epsilon=3.0, data__claims__lifetime_epsilon=8.0)
    assert codes(make_plan(privacy__epsilon=3.001), policy) == ["study-epsilon"]
    assert codes(make_plan(privacy__epsilon=3.0), policy) == []


def test_a_study_that_alone_would_pass_the_lifetime_cap_is_refused(
    make_plan: MakePlan, make_policy: MakePolicy
) -> None:
    policy = make_policy(privacy__study_epsilon=8.0)
    assert codes(make_plan(privacy__epsilon=3.001), policy) == ["lifetime-epsilon"]


def test_a_private_plan_without_a_finite_epsilon_is_refused(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    assert codes(make_plan(privacy__epsilon=None), make_policy()) == ["study-epsilon", "lifetime-epsilon"]


def test_more_rounds_are_refused_for_themselves_and_for_their_steps(
    make_plan: MakePlan, make_policy: MakePolicy
) -> None:
    assert codes(make_plan(federation__rounds=21, training__local_steps=4), make_policy()) == ["rounds"]
    assert codes(make_plan(federation__rounds=21), make_policy()) == ["rounds", "total-steps"]


def test_sites_are_counted_by_what_the_quorum_lets_happen(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    policy = make_policy(federation__min_sites=5, federation__min_sites_per_round=3)
    assert codes(make_plan(federation__quorum=0.75), policy) == []  # 5 of 6 begin, 3 of 4 updates are combined
    assert codes(make_plan(federation__quorum=0.5), policy) == ["sites", "sites-per-round"]
    assert codes(make_plan(federation__sites_per_round=2), policy) == ["sites-per-round"]
    assert codes(make_plan(federation__sites=4, federation__sites_per_round=None), policy) == ["sites"]
    hidden = make_plan(federation__sites=100, federation__sites_per_round=None, federation__quorum=0.01)
    assert codes(hidden, policy) == ["sites", "sites-per-round"]


@pytest.mark.parametrize(
    ("allowed", "wanted", "inside"),
    [
        ("any", ["k_proj"], True),
        (["all-linear"], ["k_proj"], True),
        (["all-linear"], "auto", True),
        (["auto"], "auto", True),
        (["auto"], "all-linear", False),
        (["*_proj"], ["k_proj", "v_proj"], True),
        (["*_proj"], ["dense"], False),
        (["v_proj"], ["self_attn.v_proj"], True),
        (["self_attn.v_proj"], ["v_proj"], False),
        (["v_proj"], ["V_proj"], False),
        (["auto"], ["auto"], True),
    ],
)
def test_targets_are_words_names_and_patterns(
    make_plan: MakePlan, make_policy: MakePolicy, allowed: Any, wanted: Any, inside: bool
) -> None:
    found = codes(make_plan(lora__targets=wanted), make_policy(adapter__targets=allowed))
    assert found == ([] if inside else ["targets"])


def off_promise() -> dict[str, Any]:
    return PrivacyPlan.off(sampling_rate=0.1, max_steps=100).about("patient_id", 8).to_dict()


def test_a_study_without_privacy_is_one_reason_and_needs_one_word(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    plan = make_plan(privacy=off_promise())
    assert codes(plan, make_policy()) == ["privacy-off"]
    assert codes(plan, make_policy(privacy__allow_off=True)) == []


def test_permission_to_run_without_privacy_loosens_nothing_for_a_private_study(
    make_plan: MakePlan, make_policy: MakePolicy
) -> None:
    assert codes(make_plan(privacy__noise_multiplier=0.1), make_policy(privacy__allow_off=True)) == ["noise-floor"]


METRICS = ["off", "noisy", "coarse", "clear"]


@pytest.mark.parametrize("most", METRICS)
@pytest.mark.parametrize("asked", METRICS)
def test_metrics_leave_in_no_clearer_form_than_allowed(
    make_plan: MakePlan, make_policy: MakePolicy, most: str, asked: str
) -> None:
    noisy = {"privacy__evaluations": 21, "privacy__evaluation_noise_multiplier": 20.0} if asked == "noisy" else {}
    found = codes(make_plan(evaluation__site_metrics=asked, **noisy), make_policy(evaluation__site_metrics=most))
    assert found == ([] if METRICS.index(asked) <= METRICS.index(most) else ["site-metrics"])


@pytest.mark.parametrize(("multiplier", "refused"), [(1.0, False), (0.99, True), (0.0, True)])
def test_the_noise_floor_holds_for_noisy_metrics_too(
    make_plan: MakePlan, make_policy: MakePolicy, multiplier: float, refused: bool
) -> None:
    noisy = {"privacy__evaluations": 21 if multiplier else 0, "privacy__evaluation_noise_multiplier": multiplier}
    plan = make_plan(evaluation__site_metrics="noisy", **noisy)
    assert codes(plan, make_policy(evaluation__site_metrics="noisy")) == (["evaluation-noise"] if refused else [])


def test_noisy_metrics_of_a_study_without_privacy_are_not_noisy(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    plan = make_plan(privacy=off_promise(), evaluation__site_metrics="noisy")
    policy = make_policy(privacy__allow_off=True, privacy__min_noise_multiplier=0.0, evaluation__site_metrics="noisy")
    assert codes(plan, policy) == ["evaluation-noise"]


def test_an_empty_policy_allows_nothing(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    policy = make_policy(models="del", data="del", tasks="del", training="del", adapter="del")
    assert {"base-model", "data-set", "task", "targets"} <= set(codes(make_plan(), policy))


def test_a_text_of_a_coordinator_does_not_fill_the_screen(make_plan: MakePlan, make_policy: MakePolicy) -> None:
    (reason,) = judge(make_plan(data__task__columns__text="x" * 100_000), make_policy(), approved=True, units=100)
    assert len(reason.text) < 500
