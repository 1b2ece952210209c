"""From a plan that came and was refused to a person's approval, without a file by another way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune_client import asked
from fedtune_client.folder import SiteFolder
from tests.client.commands.conftest import study

if TYPE_CHECKING:
    from fedtune.config.plan import StudyPlan
    from tests.client.commands.conftest import Place


def keep(place: Place, plan: StudyPlan) -> str:
    asked.keep(SiteFolder(place.site), plan)
    return plan.sha256


def test_nothing_waits_at_first(ready: Place) -> None:
    assert ready.json("asked") == []
    assert "no plan waits" in ready.done("asked").out


def test_each_plan_is_listed_with_every_reason_of_now(ready: Place) -> None:
    keep(ready, study())
    keep(ready, study("greedy", lora__rank=64))
    greedy, plain = sorted(ready.json("asked"), key=lambda entry: entry["name"])
    assert (greedy["name"], plain["plan"]) == ("greedy", study().sha256)
    assert "policy.rank" in {reason["code"] for reason in greedy["reasons"]}
    assert {reason["code"] for reason in plain["reasons"]} == {"policy.not-approved", "model.not-here"}
    text = ready.done("asked").out
    assert "policy.rank" in text
    assert "fedtune client approve PLAN" in text


def test_a_site_without_a_policy_says_that_alone(begun: Place) -> None:
    keep(begun, study())
    (entry,) = begun.json("asked")
    assert [reason["code"] for reason in entry["reasons"]] == ["policy.not-adopted"]


def test_a_plan_is_approved_by_the_first_digits_of_its_hash(ready: Place) -> None:
    plan = study()
    keep(ready, plan)
    found = ready.json("approve", plan.sha256[:12], "--yes")
    assert (found["plan"], found["new"]) == (plan.sha256, True)
    (entry,) = ready.json("asked")
    assert "policy.not-approved" not in {reason["code"] for reason in entry["reasons"]}


def test_digits_that_name_no_plan_say_where_to_look(ready: Place) -> None:
    done = ready.run("approve", "0123456789ab", "--yes")
    assert "error[config.no-plan]" in done.err
    assert "fedtune client asked" in done.err


def test_a_file_with_such_a_name_is_read_as_a_file(ready: Place) -> None:
    path = ready.write_plan(study("file"), "abcdef12")
    assert ready.json("approve", "abcdef12", "--yes")["plan"] == study("file").sha256
    assert path.exists()


def test_the_doctor_counts_what_waits(ready: Place) -> None:
    keep(ready, study())
    found = {one["check"]: one for one in ready.run("doctor", "--format", "json").json["findings"]}
    assert found["plans"]["hint"] == "fedtune client asked"
