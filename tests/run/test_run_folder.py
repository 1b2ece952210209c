from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedtune.config.compose import compose
from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.errors import RunError
from fedtune.run.folder import RunFolder, create, default_path
from fedtune.simulation.resolve import resolve
from tests.support.runs import make_study


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> StudyPlan:
    return resolve(compose(make_study(tmp_path_factory.mktemp("study")).words())).plan


def at(path: Path) -> Machine:
    return Machine(run_dir=str(path), model_folder="/models/x", data_path="/data/x.csv", threads=3)


def test_what_is_run_can_be_read_back(plan: StudyPlan, tmp_path: Path) -> None:
    made = create(plan, at(tmp_path / "deep" / "run"))
    found = RunFolder(tmp_path / "deep" / "run")
    assert found.plan().sha256 == plan.sha256
    assert found.machine() == at(tmp_path / "deep" / "run")
    assert found.summary() is None
    assert made.checkpoints.is_dir()
    assert made.sites.is_dir()


def test_an_empty_folder_is_taken_and_a_used_one_never(plan: StudyPlan, tmp_path: Path) -> None:
    create(plan, at(tmp_path))
    with pytest.raises(RunError) as caught:
        create(plan, at(tmp_path))
    assert caught.value.code == "run.exists"
    assert f"fedtune simulate --resume {tmp_path}" in caught.value.hint


def test_what_a_killed_beginning_left_behind_does_not_block_the_folder(plan: StudyPlan, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "machine.json").write_text("{")
    (tmp_path / ".plan.json.partial").write_text("{")
    assert create(plan, at(tmp_path)).plan().sha256 == plan.sha256


@pytest.mark.parametrize("name", ["notes.txt", "summary.json", "metrics.jsonl", ".git"])
def test_a_folder_with_anything_else_in_it_is_refused(plan: StudyPlan, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=re.escape(name)):
        create(plan, at(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_default_folders_are_named_by_study_and_time_and_never_the_same(tmp_path: Path) -> None:
    seen: set[Path] = set()
    for _ in range(3):
        path = default_path(str(tmp_path), "banks")
        assert re.fullmatch(r"banks/\d{8}-\d{6}(-\d+)?", str(path.relative_to(tmp_path)))
        assert path not in seen
        seen.add(path)
        path.mkdir(parents=True)


@pytest.mark.parametrize("last", [0, 2, 9])
def test_rewinding_keeps_the_lines_of_finished_rounds(tmp_path: Path, last: int) -> None:
    folder = RunFolder(tmp_path)
    folder.rewind_metrics(last)
    for number in (1, 2, 3):
        folder.log_metrics({"round": number, "metrics": {"loss": 0.1 * number}})
    with folder.metrics_file.open("ab") as file:
        file.write(b'{"round": 4')
    folder.rewind_metrics(last)
    folder.log_metrics({"round": last + 1})
    rounds = [int(text.split('"round": ')[1].rstrip("}")) for text in folder.metrics_file.read_text().splitlines()]
    assert rounds == [number for number in (1, 2, 3) if number <= last] + [last + 1]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_a_damaged_file_of_a_run_is_an_error_with_a_hint(plan: StudyPlan, tmp_path: Path, content: bytes) -> None:
    folder = create(plan, at(tmp_path))
    for file, read in ((folder.plan_file, folder.plan), (folder.machine_file, folder.machine)):
        file.write_bytes(content)
        with pytest.raises(Exception, match="cannot be read") as caught:
            read()
        assert getattr(caught.value, "hint", "")
    if content != b"[]":
        folder.summary_file.write_bytes(content)
        with pytest.raises(RunError, match=r"summary\.json cannot be read"):
            folder.summary()


def test_a_run_is_held_by_one_process_at_a_time(plan: StudyPlan, tmp_path: Path) -> None:
    folder = create(plan, at(tmp_path))
    with folder.in_use(), pytest.raises(RunError) as caught, RunFolder(tmp_path).in_use():
        pass
    assert caught.value.code == "run.in-use"
    with RunFolder(tmp_path).in_use():
        pass
