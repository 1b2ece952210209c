"""Flower's own engine gives what the in-process grid gives, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Done, Study, events, metric_lines, released, run_process

pytestmark = pytest.mark.slow


def run(study: Study, folder: Path, *changes: str) -> Done:
    words = study.words("federation.sites_per_round=2", "aggregation.server_optimizer=fedavgm", f"run.dir={folder}")
    return run_process("simulate", *words, *changes, "--format", "json")


def comparable(folder: Path) -> tuple[Any, ...]:
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    lines = [{**line, "seconds": 0} for line in metric_lines(folder)]
    return {**summary, "seconds": 0, "run_dir": ""}, lines, events(folder), released(folder)


def test_ray_and_in_process_give_the_same_study(study: Study, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    for backend in ("inprocess", "ray"):
        done = run(study, tmp_path / backend, f"run.backend={backend}")
        assert done.code == 0, done.err
        assert done.json["rounds"] == 2
    assert comparable(tmp_path / "ray") == comparable(tmp_path / "inprocess")


def test_a_study_without_a_quorum_ends_on_ray_as_it_does_in_process(study: Study, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    for backend in ("inprocess", "ray"):
        done = run(study, tmp_path / backend, f"run.backend={backend}", "training.learning_rate=1e6")
        assert done.code == 3, (done.out, done.err)
        assert json.loads(done.err.splitlines()[-1])["error"]["code"] == "federation.no-quorum"
