from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.client.commands.conftest import study
from tests.support.terminal import in_terminal

if TYPE_CHECKING:
    from tests.client.commands.conftest import Place


def test_a_plan_is_shown_in_words_and_approved_by_its_hash(ready: Place) -> None:
    found = ready.json("approve", "plan.json", "--by", "A. Person", "--yes")
    assert set(found) == {"plan", "by", "asks", "approved", "new", "forecast"}
    assert (found["plan"], found["approved"], found["new"]) == (study().sha256, True, True)
    assert set(found["asks"]) == {
        "study",
        "purpose",
        "data set",
        "task",
        "privacy",
        "noise",
        "work",
        "base model",
        "adapter",
        "held-out metrics",
    }
    record = ready.records()[-1]
    assert (record["kind"], record["entry"]) == ("plan-approved", {"by": "A. Person", "plan": study().sha256})
    again = ready.json("approve", "plan.json", "--yes")
    assert (again["approved"], again["new"]) == (True, False)
    assert ready.kinds().count("plan-approved") == 1


def test_the_words_tell_data_purpose_privacy_noise_rounds_and_metrics(ready: Place) -> None:
    text = " ".join(ready.done("approve", "plan.json", "--yes").out.split())
    for words in (
        "data set: claims; it reads the columns note, category, patient_id",
        "purpose: research",
        "(ε = 2.5, δ = 1e-06)-differential privacy for one unit (all records with the same patient_id",
        "times the clip norm 1, in every step (cryptographic)",
        "20 rounds of 5 steps, with 6 sites",
        "held-out metrics: off: nothing leaves the site",
        "the data's ε would go from 0.000 to 2.500, of at most 8",
        "policy, consent and budget allow it",
    ):
        assert words in text


def test_approving_overrules_no_policy_and_says_so(ready: Place) -> None:
    greedy = study("greedy", lora__rank=64, evaluation__site_metrics="clear")
    path = ready.write_plan(greedy, "greedy.json")
    done = ready.done("approve", str(path), "--yes")
    assert "NO ε COVERS THEM" in done.out
    assert "against it: the rank is 64; the site's policy allows at most 8 [policy.rank]" in done.out
    assert "[policy.site-metrics]" in done.out
    assert ready.run("policy", "check", "--plan", str(path)).code == 7


def test_a_run_folder_and_the_output_of_fedtune_plan_name_the_same_plan(ready: Place) -> None:
    run = ready.folder / "run"
    run.mkdir()
    (run / "plan.json").write_text(study().json_text)
    document = {"plan": study().model_dump(mode="json"), "plan_sha256": study().sha256, "warnings": []}
    (ready.folder / "shown.json").write_text(json.dumps(document, indent=1))
    assert ready.json("approve", "run", "--yes")["new"] is True
    assert ready.json("approve", "shown.json", "--yes")["new"] is False


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "config.no-plan"),
        ("{", "policy.plan-not-json"),
        ('{"_target_": "os.system"}', "policy.plan-executable"),
        ('{"plan": {"name": "../x"}, "plan_sha256": "0"}', "policy.plan-missing-key"),
        ("\x00\udcff", "config.no-plan"),
    ],
)
def test_what_is_no_plan_is_refused_with_a_code(ready: Place, content: str | None, code: str) -> None:
    path = ready.folder / "strange.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    done = ready.run("approve", str(path), "--yes")
    assert (done.code, done.out) == (2, "")
    assert f"error[{code}]" in done.err
    assert "hint: " in done.err


def test_a_person_reads_and_answers(ready: Place) -> None:
    question = "does A. Person agree to this plan?"
    words = ["client", "approve", "plan.json", "--by", "A. Person"]
    no = in_terminal(*words, answers=[(question, "n")], folder=ready.folder)
    assert no.code == 2
    assert "error[config.declined]" in no.text
    assert "plan-approved" not in ready.kinds()
    assert "error[config.not-confirmed]" in ready.run("approve", "plan.json").err
    yes = in_terminal(*words, answers=[(question, "y")], folder=ready.folder)
    assert yes.code == 0, yes.text
    assert "held-out metrics: off" in yes.text
    assert ready.kinds()[-1] == "plan-approved"


def test_a_name_that_acts_on_a_terminal_is_refused(ready: Place) -> None:
    assert "error[config.bad-name]" in ready.run("approve", "plan.json", "--by", "a\x1b[2J", "--yes").err
