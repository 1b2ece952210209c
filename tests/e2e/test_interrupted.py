"""Ctrl-C ends a study cleanly at any moment, and the study continues as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.compose import compose
from fedtune.run.folder import RunFolder
from fedtune.simulation.resolve import resolve
from fedtune.simulation.runner import continue_run, simulate
from tests.support.journal_lines import entries
from tests.support.runs import Study, command, events, metric_lines, process, released, summary_of
from tests.support.watching import At, ctrl_c


def interrupted_at(study: Study, run: Path, moment: str, *changes: str) -> None:
    """Start a study and stop it at a moment."""
    resolved = resolve(compose(study.words(f"run.dir={run}", *changes)))
    with pytest.raises(KeyboardInterrupt, match=f"fedtune simulate --resume {run}"):
        simulate(resolved.plan, resolved.machine, At(moment, ctrl_c))
    assert RunFolder(run).summary() is None


def resumed(run: Path) -> dict[str, Any]:
    done = command("simulate", "--resume", str(run), "--format", "json")
    assert done.code == 0, done.err
    result: dict[str, Any] = done.json
    return result


@pytest.fixture(autouse=True)
def one_site_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast machine would train a second tiny site before it tells of the first."""
    monkeypatch.setattr("fedtune.flower.grid._SLICE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def whole(study: Study) -> dict[str, Any]:
    return summary_of(*study.words("federation.rounds=3", "aggregation.server_optimizer=fedavgm"))


@pytest.mark.parametrize(
    "moment",
    ["study_started", "round_started 1", "site_done site-001", "round_done 1", "round_started 2", "round_done 3"],
)
def test_a_study_stopped_at_any_moment_ends_as_if_nothing_had_happened(
    study: Study, whole: dict[str, Any], tmp_path: Path, moment: str
) -> None:
    run = tmp_path / "run"
    interrupted_at(study, run, moment, "federation.rounds=3", "aggregation.server_optimizer=fedavgm")
    summary = resumed(run)
    assert released(run) == released(Path(whole["run_dir"]))
    assert {key: summary[key] for key in ("metrics", "sites", "privacy")} == {
        key: whole[key] for key in ("metrics", "sites", "privacy")
    }
    assert [line["round"] for line in metric_lines(run)] == [1, 2, 3]


def test_a_study_stopped_in_every_round_in_turn_continues_each_time(
    study: Study, whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted_at(study, run, "round_started 1", "federation.rounds=3", "aggregation.server_optimizer=fedavgm")
    for moment in ("site_done site-002", "round_started 2", "round_started 3"):
        with pytest.raises(KeyboardInterrupt):
            continue_run(run, At(moment, ctrl_c))
    assert resumed(run)["metrics"] == whole["metrics"]
    assert released(run) == released(Path(whole["run_dir"]))


def test_an_update_with_fresh_noise_is_sent_again_and_not_made_again(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted_at(study, run, "site_done site-001", "privacy.noise=secure")
    assert {site: len(lines) for site, lines in events(run).items()} == {"site-001": 1, "site-002": 0, "site-003": 0}
    summary = resumed(run)
    assert [line["round"] for line in events(run)["site-001"]] == [1, 2]
    sent = entries(run / "sites" / "site-001" / "site-001.journal", "update-sent")
    assert [line["again"] for line in sent] == [False, True, False]
    assert {site["rounds"] for site in summary["sites"]} == {2}
    assert summary["privacy"]["max_epsilon"] <= 8


def test_a_round_that_was_lost_stays_charged_and_the_site_stops_at_the_plans_epsilon(
    study: Study, tmp_path: Path
) -> None:
    """What a site keeps of its first round is lost, so that it has to draw new noise: its last round is too much."""
    run = tmp_path / "run"
    interrupted_at(study, run, "site_done site-001", "privacy.noise=secure")
    for item in (run / "sites" / "site-001" / "vault").rglob("training-*"):
        item.unlink()
    summary = resumed(run)
    assert [line["round"] for line in events(run)["site-001"]] == [1, 1]
    sites = {site["name"]: site for site in summary["sites"]}
    assert (sites["site-001"]["rounds"], sites["site-001"]["failures"]) == (1, {"ledger.over-cap": 1})
    assert {site["epsilon"] for site in summary["sites"]} == {summary["privacy"]["max_epsilon"]}
    assert summary["privacy"]["max_epsilon"] <= 8


def test_seeded_noise_is_drawn_again_the_same_and_costs_once(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted_at(study, run, "site_done site-001")
    summary = resumed(run)
    assert [line["round"] for line in events(run)["site-001"]] == [1, 2]
    assert len({site["epsilon"] for site in summary["sites"]}) == 1
    assert summary["privacy"]["max_epsilon"] <= 8


def test_ctrl_c_in_a_terminal_ends_with_130_and_names_the_way_on(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    running = process("simulate", *study.words("federation.rounds=400", "privacy=off", f"run.dir={run}"))
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("round   2/"):
            break
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert "error[interrupted]: stopped by Ctrl-C" in err
    assert f"hint: continue with `fedtune simulate --resume {run}`" in err
    assert "Traceback" not in err
    done = [line["round"] for line in metric_lines(run)]
    with pytest.raises(KeyboardInterrupt):
        continue_run(run, At(f"round_done {done[-1] + 3}", ctrl_c))
    assert [line["round"] for line in metric_lines(run)] == list(range(1, done[-1] + 4))
