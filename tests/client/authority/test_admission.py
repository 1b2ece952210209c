"""A site takes part in what its policy allows, says every reason why not, and lets one code out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedtune.config.canonical import canonical_json
from fedtune.errors import PolicyError
from fedtune_client import operator
from tests.client.authority.conftest import MakeSite, MakeStudy
from tests.support.opens import opened_files
from tests.support.sites import RealSite, content_of

FIVE = {
    "training__max_rounds": 1,
    "adapter__max_rank": 1,
    "privacy__min_noise_multiplier": 50.0,
    "federation__min_sites": 30,
    "tasks": ["causal-lm"],
}
REASONS = {"policy.rounds", "policy.rank", "policy.noise-floor", "policy.sites", "policy.task"}


def test_a_plan_that_breaks_five_rules_has_five_reasons_in_the_journal_and_one_code_outside(site: RealSite) -> None:
    site.adopt(**FIVE)
    reply = site.ask(number=1)
    assert content_of(reply.content) == {"fedtune": {"schema": 2, "kind": "refusal", "code": "policy.refused"}}
    (refused,) = site.entries("plan-refused")
    assert set(refused["reasons"]) == REASONS
    assert len(refused["reasons"]) == 5


def test_the_operator_reads_a_sentence_for_each_reason(site: RealSite, caplog: pytest.LogCaptureFixture) -> None:
    site.adopt(**FIVE)
    with caplog.at_level("DEBUG"):
        site.ask(number=1)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.exc_info is not None
    error = record.exc_info[1]
    assert isinstance(error, PolicyError)
    assert error.message.count("the site's policy allows") == 5


def test_a_refusal_is_written_down_once_for_the_same_reasons(site: RealSite) -> None:
    site.adopt(**FIVE)
    assert {site.refusal(1), site.refusal(2), site.restart().refusal(1)} == {"policy.refused"}
    assert len(site.entries("plan-refused")) == 1
    site.adopt(adapter__max_rank=1)
    assert site.refusal(1) == "policy.rank"
    assert [len(entry["reasons"]) for entry in site.entries("plan-refused")] == [5, 1]


def test_a_stricter_policy_ends_a_study_at_its_next_round_and_the_old_one_lets_it_go_on(site: RealSite) -> None:
    site.update(1)
    site.adopt(adapter__max_rank=1)
    assert site.refusal(2) == "policy.rank"
    assert site.refusal(1) == "policy.rank"  # nor is the stored update sent
    site.adopt()
    first = content_of(site.ask(number=1).content)
    assert [event.steps for event in site.update(2).events] == [2]
    assert content_of(site.ask(number=1).content) == first
    assert site.charged == 2
    kinds = [entry["kind"] for entry in site.entries("plan-accepted", "plan-refused", "policy-adopted")]
    assert kinds == ["policy-adopted", "plan-accepted", "policy-adopted", "plan-refused", *kinds[:2]]


def test_a_plan_needs_the_approval_of_exactly_itself(make_a_site: MakeSite, make_other_study: MakeStudy) -> None:
    site, other = make_a_site(require_approval=True), make_other_study(study__name="another")
    operator.approve(site.open(), other.plan, "the wrong one")
    assert site.refusal(1) == "policy.not-approved"
    operator.approve(site.open(), site.study.plan, "Dr. Roe")
    site.update(1)
    assert [entry["by"] for entry in site.entries("plan-approved")] == ["the wrong one", "Dr. Roe"]


def test_a_site_that_requires_secure_aggregation_takes_part_in_nothing(site: RealSite) -> None:
    site.adopt(federation__require_secure_aggregation=True)
    assert site.refusal(1) == "policy.secure-aggregation"


def test_a_site_without_a_policy_takes_part_in_nothing(make_a_site: MakeSite, make_other_study: MakeStudy) -> None:
    from tests.support.sites import KEY, begin

    site = RealSite(make_a_site().path.with_name("another"), make_other_study())
    begin(site.folder, "mercy", KEY).journal.close()
    assert site.restart().refusal(1) == "policy.not-adopted"


def edited(site: RealSite, change: Any) -> str:
    tree = json.loads(site.study.plan.json_text)
    change(tree)
    return canonical_json(tree)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("policy.plan-unknown-key", lambda tree: tree.update(code="import os")),
        ("policy.plan-unknown-key", lambda tree: tree["training"].update(hook="x")),
        ("policy.plan-executable", lambda tree: tree["training"].update(_target_="os.system")),
        ("policy.plan-executable", lambda tree: tree["data"]["task"].update(_target_="os.system")),
        ("policy.plan-path", lambda tree: tree["model"].update(name="../../etc/passwd")),
        ("policy.plan-path", lambda tree: tree["data"]["task"]["columns"].update(text="/etc/passwd")),
        ("policy.plan-bad-value", lambda tree: tree["data"].update(name="../claims")),
        ("policy.plan-missing-key", lambda tree: tree.pop("purpose")),
        ("policy.plan-promise", lambda tree: tree["privacy"].update(noise_multiplier=0.0)),
    ],
)
def test_a_plan_that_is_no_plan_is_refused_by_a_code_and_leaves_no_record(
    site: RealSite, code: str, change: Any
) -> None:
    before = site.journal.read_bytes()
    with opened_files() as opened:
        assert site.refusal(1, plan_text=edited(site, change)) == code
    assert str(site.data) not in opened
    assert site.journal.read_bytes() == before


def test_a_plan_that_was_changed_after_it_was_hashed_is_another_plan(site: RealSite) -> None:
    """It is admitted or not by what it says; a message that names the plan of before is none of its."""
    text = edited(site, lambda tree: tree.update(seed=1234))
    assert site.refusal(1, plan_text=text) == "message.other-plan"
    assert site.charged == 0


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("privacy.overspends", lambda tree: tree["privacy"].update(epsilon=0.5)),
        ("privacy.overspends", lambda tree: tree["federation"].update(rounds=10_000)),
    ],
)
def test_a_promise_that_its_noise_does_not_keep_is_refused(site: RealSite, code: str, change: Any) -> None:
    from dataclasses import replace

    from fedtune.config.plan import StudyPlan

    plan = StudyPlan.from_json(edited(site, change))
    study = replace(site.study, bench=replace(site.study.bench, plan=plan))
    site.adopt(training__max_rounds=100_000, training__max_total_steps=100_000)
    assert site.refusal(1, study=study) == code
    assert site.charged == 0
    (refused,) = site.entries("plan-refused")
    assert refused["reasons"] == [code]
