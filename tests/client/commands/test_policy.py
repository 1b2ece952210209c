from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.client.commands.conftest import study
from tests.support.terminal import in_terminal

if TYPE_CHECKING:
    from tests.client.commands.conftest import Place


def test_a_policy_is_checked_without_a_secret(begun: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    found = begun.json("policy", "check")
    assert set(found) == {"file", "sha256", "in_force", "plan"}
    assert (found["in_force"], found["plan"]) == (False, None)


def test_every_mistake_of_a_policy_is_named_with_its_line(begun: Place) -> None:
    file = begun.site / "policy.yaml"
    file.write_text(file.read_text().replace("max_rank", "max_rnak").replace("delta: 1.0e-06", "delta: 7"))
    done = begun.run("policy", "check")
    assert done.code == 2
    assert "3 mistakes" in done.err or "2 mistakes" in done.err
    assert "adapter.max_rnak is not a key; nearest: adapter.max_rank" in done.err
    assert "privacy.delta is '7'" in done.err
    assert "policy.yaml line " in done.err
    assert begun.run("policy", "adopt", "--yes").code == 2
    assert begun.kinds() == ["site-created"]


def test_a_plan_is_judged_with_every_reason_and_an_exit_code(ready: Place) -> None:
    other = study("greedy", 2.5, lora__rank=64, data__max_tokens=4096, purpose="marketing")
    ready.write_plan(other)
    done = ready.run("policy", "check", "--plan", "plan.json", "--format", "json")
    assert done.code == 7
    judged = done.json["plan"]
    assert set(judged) == {"name", "sha256", "inside", "reasons"}
    assert {reason["code"] for reason in judged["reasons"]} == {
        "policy.rank",
        "policy.max-tokens",
        "policy.purpose",
        "policy.not-approved",
    }
    assert all(set(reason) == {"code", "found", "allowed", "text"} for reason in judged["reasons"])
    text = ready.run("policy", "check", "--plan", "plan.json")
    assert text.code == 7
    assert "the rank is 64; the site's policy allows at most 8 [policy.rank]" in text.out


def test_a_plan_that_is_approved_and_inside_is_inside(ready: Place) -> None:
    ready.done("approve", "plan.json", "--yes")
    assert ready.json("policy", "check", "--plan", "plan.json")["plan"]["inside"] is True


def test_a_policy_is_checked_where_there_is_no_site(begun: Place) -> None:
    file = begun.folder / "mine.yaml"
    file.write_text((begun.site / "policy.yaml").read_text())
    nowhere = ["--site", str(begun.folder / "nowhere")]
    assert begun.json("policy", "check", str(file), *nowhere)["in_force"] is False
    judged = begun.run("policy", "check", str(file), "--plan", "plan.json", *nowhere, "--format", "json")
    assert {reason["code"] for reason in judged.json["plan"]["reasons"]} == {"policy.few-units", "policy.not-approved"}


def test_a_policy_is_adopted_once_and_its_changes_are_shown(begun: Place) -> None:
    first = begun.json("policy", "adopt", "--yes")
    assert set(first) == {"sha256", "adopted", "differences"}
    assert first["adopted"] is True
    assert {"key": "adapter.max_rank", "before": None, "after": 8} in first["differences"]
    again = begun.json("policy", "adopt", "--yes")
    assert (again["adopted"], again["sha256"]) == (False, first["sha256"])
    begun.policy(privacy__study_epsilon=2.0)
    shown = begun.json("policy", "show")
    assert set(shown) == {"sha256", "policy", "file", "differences"}
    assert (shown["sha256"], shown["policy"]["privacy"]["study_epsilon"]) == (first["sha256"], 3.0)
    assert shown["differences"] == [{"key": "privacy.study_epsilon", "before": 3.0, "after": 2.0}]
    assert "privacy.study_epsilon: 3.0 → 2.0" in begun.done("policy", "show").out
    begun.done("policy", "adopt", "--yes")
    assert begun.json("policy", "show")["differences"] == []
    assert begun.kinds() == ["site-created", "policy-adopted", "policy-adopted"]


def test_what_is_shown_as_in_force_can_be_adopted_again(begun: Place) -> None:
    begun.done("policy", "adopt", "--yes")
    text = begun.done("policy", "show").out
    (begun.site / "policy.yaml").write_text(text, encoding="utf-8")
    assert begun.json("policy", "check")["in_force"] is True


def test_without_a_terminal_nothing_is_adopted_unasked(begun: Place) -> None:
    done = begun.run("policy", "adopt")
    assert done.code == 2
    assert "error[config.not-confirmed]" in done.err
    assert "repeat it with --yes" in done.err
    assert begun.kinds() == ["site-created"]


def test_a_person_is_asked_and_may_say_no(begun: Place) -> None:
    question = "adopt the policy"
    no = in_terminal("client", "policy", "adopt", answers=[(question, "n")], folder=begun.folder)
    assert no.code == 2
    assert "error[config.declined]: nothing was changed" in no.text
    assert begun.kinds() == ["site-created"]
    yes = in_terminal("client", "policy", "adopt", answers=[(question, "y")], folder=begun.folder)
    assert yes.code == 0, yes.text
    assert begun.kinds() == ["site-created", "policy-adopted"]


def test_before_the_first_policy_the_next_command_is_named(begun: Place) -> None:
    assert "adopt one: fedtune client policy adopt" in begun.done("policy", "show").out
    done = begun.run("budget", "--forecast", "plan.json")
    assert "error[policy.not-adopted]" in done.err
    assert "hint: fedtune client policy adopt" in done.err


def test_a_folder_without_a_site_is_an_error_that_names_init(empty: Place) -> None:
    for words in (["policy", "show"], ["budget"], ["consent", "list"], ["journal", "show"], ["journal", "verify"]):
        done = empty.run(*words)
        assert (done.code, done.out) == (2, ""), words
        assert "error[config.no-site]: site is not a site's folder" in done.err
        assert "fedtune client init NAME" in done.err
    for words in (["policy", "adopt", "claims.csv"], ["key", "rotate"], ["consent", "revoke", "3"]):
        assert "fedtune client init" in empty.run(*words).err or words[0] == "policy"
