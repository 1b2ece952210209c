from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedtune.config.compose import compose
from fedtune.errors import RunError
from fedtune.simulation import observer
from fedtune.simulation.progress import NullProgress, PlainProgress, RoundInfo, StudyInfo
from fedtune.simulation.resolve import Resolved, resolve
from fedtune.simulation.runner import continue_run, refuse_other_plan, simulate
from tests.support.runs import Study


class Heard(NullProgress):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.moments: list[str] = []
        self.rounds: list[RoundInfo] = []

    def study_started(self, study: StudyInfo) -> None:
        self.moments.append(f"study {study.rounds} x {study.sites}")

    def round_started(self, number: int, asked: int | None = None) -> None:
        self.moments.append(f"round {number} asks {asked}")

    def site_done(self, name: str) -> None:
        self.moments.append(name)

    def round_done(self, result: RoundInfo) -> None:
        self.moments.append(f"round {result.number} done")
        self.rounds.append(result)

    def study_done(self) -> None:
        self.moments.append("end")


def resolved(study: Study, run: Path, *changes: str) -> Resolved:
    return resolve(compose(study.words(f"run.dir={run}", *changes)))


def test_progress_hears_each_moment_in_order(study: Study, tmp_path: Path) -> None:
    found, heard = resolved(study, tmp_path / "run", "federation.sites_per_round=2"), Heard()
    simulate(found.plan, found.machine, heard)
    shape = [moment if not moment.startswith("site") else "site" for moment in heard.moments]
    one = ["site", "site"]
    rounds = ["round 1 asks 2", *one, "round 1 done", "round 2 asks 2", *one, "round 2 done"]
    assert shape[:-1] == ["study 2 x 2", *rounds, *shape[9:-1]]
    assert set(shape[9:]) == {"end"}
    assert [(result.asked, result.done, result.failed) for result in heard.rounds] == [(2, 2, {})] * 2
    assert heard.rounds[0].bytes_up > 0 < heard.rounds[0].bytes_down


def test_nobody_watches_after_a_study(study: Study, tmp_path: Path) -> None:
    found = resolved(study, tmp_path / "run")
    simulate(found.plan, found.machine, Heard())
    assert isinstance(observer.current(), NullProgress)


def test_a_run_can_be_moved_and_continued_elsewhere(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolved(study, tmp_path / "run")
    summary = simulate(found.plan, found.machine, NullProgress())
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "checkpoints" / "round-000002.safetensors").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    again = continue_run(Path("moved"), NullProgress())
    assert again["run_dir"] == "moved"
    assert again["metrics"] == summary["metrics"]
    assert not (tmp_path / "run").exists()


def test_a_plan_is_compared_by_its_hash(study: Study, tmp_path: Path) -> None:
    found = resolved(study, tmp_path / "run")
    simulate(found.plan, found.machine, NullProgress())
    refuse_other_plan(tmp_path / "run", found.plan)
    with pytest.raises(RunError, match="the overrides describe plan") as caught:
        refuse_other_plan(tmp_path / "run", resolved(study, tmp_path / "run", "seed=4").plan)
    assert caught.value.code == "run.other-plan"


def test_a_summary_that_was_lost_is_written_again_without_training(study: Study, tmp_path: Path) -> None:
    found, heard = resolved(study, tmp_path / "run"), Heard()
    summary = simulate(found.plan, found.machine, NullProgress())
    (tmp_path / "run" / "summary.json").unlink()
    again = continue_run(tmp_path / "run", heard)
    assert not [moment for moment in heard.moments if moment.startswith("round")]
    assert {**again, "seconds": 0, "traffic": {}} == {**summary, "seconds": 0, "traffic": {}}


def test_progress_that_cannot_be_shown_is_no_reason_to_lose_a_study(study: Study, tmp_path: Path) -> None:
    found = resolved(study, tmp_path / "run")
    with Path(os.devnull).open("w", encoding="ascii") as stream:
        assert simulate(found.plan, found.machine, PlainProgress(stream))["rounds"] == 2
