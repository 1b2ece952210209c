"""SIGKILL at any moment, then `--resume`: the same adapter bit for bit, and no event forgotten."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import kill_when, lines_of, start
from tests.support.runs import Study, command, events, metric_lines, released, run_process

ROUNDS = 16
STATEFUL = [
    f"federation.rounds={ROUNDS}",
    "training.local_steps=2",
    "training.optimizer=adamw",
    "training.optimizer_state=keep",
    "training.learning_rate=0.05",
    "training.schedule=linear",
    "aggregation.algorithm=fedit",
    "aggregation.server_optimizer=fedavgm",
    "aggregation.average_last=3",
    "federation.sites_per_round=2",
    "lora.dropout=0.1",
]


@pytest.fixture(scope="module")
def uninterrupted(study: Study) -> Path:
    folder = study.runs / "uninterrupted"
    assert command("simulate", *study.words(*STATEFUL, f"run.dir={folder}")).code == 0
    return folder


def summary(run: Path) -> dict[str, Any]:
    """Return what two equal studies have in common; a resumed one asks its sites once more who they are."""
    content: dict[str, Any] = json.loads((run / "summary.json").read_text("utf-8"))
    return {key: value for key, value in content.items() if key not in {"seconds", "run_dir", "traffic"}}


def charged(run: Path) -> dict[str, set[int]]:
    return {site: {line["round"] for line in lines} for site, lines in events(run).items()}


def assert_equal_studies(run: Path, uninterrupted: Path) -> None:
    assert released(run) == released(uninterrupted)
    assert summary(run) == summary(uninterrupted)
    assert charged(run) == charged(uninterrupted)
    lines = [[without_costs(line) for line in metric_lines(path)] for path in (run, uninterrupted)]
    assert lines[0] == lines[1]
    assert [line["round"] for line in lines[0]] == list(range(1, ROUNDS + 1))


def without_costs(line: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a kill changes: time, and bytes, because heads and receipts carry the journal's record number."""
    changed = {"seconds", "merging_seconds", "bytes_up", "bytes_down"}
    return {key: value for key, value in line.items() if key not in changed}


def begin_or_resume(study: Study, run: Path) -> list[str]:
    if (run / "plan.json").exists():
        return ["simulate", "--resume", str(run)]
    return ["simulate", *study.words(*STATEFUL, f"run.dir={run}")]


def kill_often(study: Study, run: Path, wanted: int, seed: int) -> int:
    """Kill at random moments, in the middle of rounds and right after checkpoints until `wanted` kills have hit."""
    draw, kills = random.Random(seed), 0
    while kills < wanted and not (run / "summary.json").exists():
        process = start(begin_or_resume(study, run))
        kills += kill_when(process, some_moment(run, draw), after=draw.choice([0.0, draw.uniform(0.0, 0.03)]))
    return kills


def some_moment(run: Path, draw: random.Random) -> Callable[[], bool]:
    """Choose a time, the next event that a site writes down, or the next checkpoint."""
    spent, saved = run / "sites" / "site-001" / "site-001.journal", newest(run)
    lines, end = lines_of(spent), time.monotonic() + draw.uniform(0.0, 0.5)
    return draw.choice([lambda: time.monotonic() > end, lambda: lines_of(spent) > lines, lambda: newest(run) != saved])


def newest(run: Path) -> str:
    return max((path.name for path in (run / "checkpoints").glob("round-*")), default="")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_study_killed_again_and_again_ends_as_if_nothing_had_happened(
    study: Study, uninterrupted: Path, seed: int
) -> None:
    run = study.runs / f"killed-{seed}"
    assert kill_often(study, run, 8, seed) >= 6
    last = command(*begin_or_resume(study, run))
    assert last.code == 0, last.err
    assert_equal_studies(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_study_killed_dozens_of_times_ends_as_if_nothing_had_happened(
    study: Study, uninterrupted: Path, seed: int
) -> None:
    run = study.runs / f"killed-{seed}"
    kill_often(study, run, 25, seed)
    assert command(*begin_or_resume(study, run)).code == 0
    assert_equal_studies(run, uninterrupted)


def test_a_killed_command_continues_in_a_new_process(study: Study, uninterrupted: Path) -> None:
    run = study.runs / "killed-process"
    assert kill_often(study, run, 1, seed=5) == 1
    done = run_process(*begin_or_resume(study, run))
    assert done.code == 0, done.err
    assert_equal_studies(run, uninterrupted)


def test_a_torn_last_line_of_any_file_does_not_stop_a_resume(study: Study, uninterrupted: Path) -> None:
    run = study.runs / "torn"
    process = start(begin_or_resume(study, run))
    assert kill_when(process, lambda: newest(run) >= "round-000003")
    for path in [run / "metrics.jsonl", *run.glob("sites/*/*.journal"), *run.glob("sites/*/heads.jsonl")]:
        with path.open("ab") as file:
            file.write(b'{"round": 9')
    assert command("simulate", "--resume", str(run)).code == 0
    assert_equal_studies(run, uninterrupted)
