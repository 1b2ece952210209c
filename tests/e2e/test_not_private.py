"""Without privacy every output says NOT PRIVATE; with it, what was spent is what was promised, or less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.privacy.accounting import Event, epsilon
from tests.support.runs import Study, command, events, metric_lines, summary_of


def test_a_study_without_privacy_says_so_in_every_output(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("simulate", *study.words("privacy=off", f"run.dir={run}"))
    assert "NOT PRIVATE" in done.out
    lines = done.err.splitlines()
    assert any(line.startswith("warning: NOT PRIVATE") for line in lines)
    assert any("3 sites a round, NOT PRIVATE" in line for line in lines)
    assert all("NOT PRIVATE" in line for line in lines if line.startswith("round "))
    assert "NOT PRIVATE" in (run / "adapter" / "README.md").read_text("utf-8")
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary["privacy"]["statement"].startswith("NOT PRIVATE")
    assert (summary["privacy"]["mode"], summary["privacy"]["max_epsilon"]) == ("off", None)
    assert [site["epsilon"] for site in summary["sites"]] == [None, None, None]
    assert {line["event"] for lines in events(run).values() for line in lines} == {None}
    assert {line["epsilon"] for line in metric_lines(run)} == {None}


def test_plan_evaluate_predict_and_a_sweep_of_it_say_so_too(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = study.words("privacy=off")
    assert "NOT PRIVATE" in command("simulate", *words, f"run.dir={run}", "--format", "json").out
    assert command("simulate", *words, "seed=1,2").out.count("NOT PRIVATE") == 2
    assert "NOT PRIVATE" in command("plan", *words).out
    assert "NOT PRIVATE" in command("plan", *words, "--format", "json").json["privacy"]["statement"]
    for options in ((), ("--format", "json")):
        assert "NOT PRIVATE" in command("evaluate", str(run), str(study.data), *options).out
    assert "NOT PRIVATE" in command("predict", str(run), str(study.data)).err


def of_site(run: Path, name: str) -> list[Event]:
    return [Event.from_dict(line["event"]) for line in events(run)[name]]


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_the_epsilon_that_is_reported_is_that_of_the_events_that_ran(study: Study, noise: str) -> None:
    words = study.words("privacy.epsilon=3", f"privacy.noise={noise}", "federation.rounds=3")
    summary, plan = summary_of(*words), command("plan", *words, "--format", "json").json
    for site in summary["sites"]:
        spent = of_site(Path(summary["run_dir"]), site["name"])
        assert (len(spent), {event.noise for event in spent}) == (3, {noise})
        assert site["epsilon"] == epsilon(spent, site["delta"]) == plan["privacy"]["epsilon"]
    assert 2.9 < summary["privacy"]["max_epsilon"] <= 3


def test_a_site_that_is_asked_less_often_spends_less(study: Study) -> None:
    summary = summary_of(*study.words("federation.rounds=6", "federation.sites_per_round=1"))
    by_rounds = sorted((site["rounds"], site["epsilon"]) for site in summary["sites"])
    assert sum(rounds for rounds, _ in by_rounds) == 6
    assert [spent for _, spent in by_rounds] == sorted(spent for _, spent in by_rounds)
    assert by_rounds[0][1] < 8


def test_secure_noise_is_fresh_each_time_and_is_not_called_a_study_alone(study: Study, tmp_path: Path) -> None:
    def metrics(name: str) -> dict[str, Any]:
        found: dict[str, Any] = summary_of(*study.words("privacy.noise=secure", f"run.dir={tmp_path / name}"))
        assert "seeded" not in found["privacy"]["statement"]
        return found["metrics"]["final"]

    first, second = metrics("one"), metrics("two")
    assert first["loss"] != second["loss"]
    card = (tmp_path / "one" / "adapter" / "README.md").read_text("utf-8")
    assert "Not for release" not in card


def test_seeded_noise_is_marked_as_not_for_release(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("simulate", *study.words(f"run.dir={run}"))
    assert "not for release" in done.out
    assert "not for release" in done.err.lower()
    assert "Not for release" in (run / "adapter" / "README.md").read_text("utf-8")
