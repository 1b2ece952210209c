"""The files that the ServerApp's process leaves for others: progress, outcome, and the newest checkpoint's facts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fedtune.aggregation.lora.protocol import ServerState
from fedtune.aggregation.server_optimizers import OptimizerState
from fedtune.errors import DataError, FederationError
from fedtune.simulation.progress import RoundInfo, StudyInfo
from fedtune_server.checkpoint import Checkpoint, save_checkpoint
from fedtune_server.studies.newest import newest_facts, newest_round
from fedtune_server.studies.outcome_file import described, read_outcome, recorded, write_outcome
from fedtune_server.studies.progress_file import FileProgress, read_progress
from tests.server.studies.conftest import keep_round

STUDY = StudyInfo("study", 10, 3, 2.5, 1e-6, "accuracy", False, False, "/runs/study")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def checkpoint(place: Path, number: int, facts: dict[str, Any]) -> None:
    arrays = {"a": np.zeros((2, 3), np.float32)}
    save_checkpoint(
        place / "checkpoints", "0" * 64, Checkpoint(number, ServerState(arrays, OptimizerState(0, {})), {}, facts)
    )


def test_progress_tells_who_has_answered_and_who_has_failed_why(place: Path) -> None:
    progress = FileProgress(place)
    progress.study_started(STUDY)
    progress.round_started(1, 3)
    progress.site_done("a")
    progress.site_failed("b", "message.not-finite")
    progress.study_done()
    found = read_progress(place)
    assert (found["round"], found["asked"], found["done"]) == (1, 3, ["a"])
    assert found["failed"] == {"b": "message.not-finite"}
    assert found["running"] is False
    assert found["study"]["rounds"] == 10


def test_what_comes_within_the_pause_is_written_soon_after_it_without_another_event(place: Path) -> None:
    progress = FileProgress(place)
    progress.study_started(STUDY)
    progress.round_started(1, 3)
    progress.site_done("a")
    until = time.monotonic() + 10
    while read_progress(place)["done"] != ["a"]:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_thousand_events_are_a_handful_of_writes(place: Path) -> None:
    progress = FileProgress(place)
    progress.study_started(STUDY)
    progress.round_started(1, 1000)
    inodes = set()
    for number in range(1000):
        progress.site_done(f"site-{number}")
        inodes.add((place / "progress.json").stat().st_mtime_ns)
    progress.study_done()
    assert len(inodes) < 100
    assert len(read_progress(place)["done"]) == 1000


def test_a_later_attempt_keeps_what_the_last_round_told(place: Path) -> None:
    progress = FileProgress(place)
    progress.study_started(STUDY)
    progress.round_done(RoundInfo(1, 3, 2, {"b": "federation.deadline"}, 0.5, 0.8, 1.5, 10, 20))
    progress.study_done()
    again = FileProgress(place)
    again.study_started(STUDY)
    again.study_done()
    last = read_progress(place)["last"]
    assert (last["number"], last["metric"], last["epsilon_spent"], last["failed"]["b"]) == (
        1,
        0.8,
        0.5,
        "federation.deadline",
    )


def test_a_disk_that_takes_no_progress_ends_no_study(place: Path) -> None:
    progress = FileProgress(place / "gone")
    progress.study_started(STUDY)
    progress.study_done()
    assert read_progress(place / "gone") == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_progress_that_was_torn_reads_as_none(place: Path, text: str) -> None:
    (place / "progress.json").write_text(text)
    assert read_progress(place) == {}
    FileProgress(place).study_started(STUDY)


def test_an_attempt_that_completes_or_fails_says_so_and_what_it_raised_goes_on(place: Path) -> None:
    keep_round(place, 7)
    with recorded(place, 12):
        pass
    found = read_outcome(place)
    assert found is not None
    assert (found.run, found.status, found.round, found.code) == (12, "completed", 7, "")
    with pytest.raises(FederationError), recorded(place, 13):
        raise FederationError("no-quorum", "1 of 3 answered", hint="mend them")
    found = read_outcome(place)
    assert found is not None
    assert (found.run, found.code, found.message, found.hint) == (
        13,
        "federation.no-quorum",
        "1 of 3 answered",
        "mend them",
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(0), "coordinator.stopped"),
        (KeyboardInterrupt(), "coordinator.stopped"),
        (OSError(28, "No space left on device"), "run.disk-full"),
        (httpx.ConnectError("refused"), "transport.lost-link"),
        (ValueError("a record said: patient 7"), "coordinator.internal"),
        (MemoryError(), "coordinator.internal"),
        (DataError("missing-column", "no column", hint="h"), "data.missing-column"),
    ],
)
def test_whatever_ends_an_attempt_has_a_code(place: Path, error: BaseException, code: str) -> None:
    with pytest.raises(type(error)), recorded(place, 1):
        raise error
    found = read_outcome(place)
    assert found is not None
    assert found.code == code
    assert found.hint


def test_the_text_of_an_unknown_error_is_not_written_down() -> None:
    assert "patient" not in " ".join(described(ValueError("a record said: patient 7")))


def test_an_outcome_that_cannot_be_written_hides_no_error(place: Path) -> None:
    with pytest.raises(FederationError), recorded(place / "gone", 1):
        raise FederationError("no-quorum", "none", hint="h")
    write_outcome(place / "gone", 1)
    assert read_outcome(place / "gone") is None


def test_the_newest_checkpoints_facts_are_read_without_its_tensors(place: Path) -> None:
    assert (newest_round(place), newest_facts(place)) == (0, {})
    for number in (1, 2, 3):
        checkpoint(place, number, {"sites": [], "refused": {"x": f"code-{number}"}})
    assert newest_round(place) == 3
    assert newest_facts(place)["refused"] == {"x": "code-3"}


@pytest.mark.parametrize("raw", [b"", b"\x00" * 8, b"\xff" * 20, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_checkpoint_that_cannot_be_read_tells_nothing(place: Path, raw: bytes) -> None:
    (place / "checkpoints" / "round-000004.safetensors").write_bytes(raw)
    assert newest_facts(place) == {}
    assert newest_round(place) == 4


def test_files_are_whole_json_at_every_moment(place: Path) -> None:
    progress = FileProgress(place)
    progress.study_started(STUDY)
    for number in range(50):
        progress.round_started(number, 3)
        progress.study_done()
        assert json.loads((place / "progress.json").read_text())["round"] == number
