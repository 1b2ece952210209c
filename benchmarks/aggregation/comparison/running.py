"""Runs studies one after the other in this process, as `fedtune simulate` does, and keeps one line of each."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.aggregation.comparison.material import Material
from benchmarks.aggregation.comparison.runs import Run

Line = dict[str, Any]
_FIRST_COUNTED = 2  # the first round has nothing of earlier ones to send


def run_all(runs: Iterable[Run], material: Material, changes: tuple[str, ...], results: Path) -> None:
    """Run what has no line in `results` yet, and append each line when its run has ended.

    Run folders are temporary. `changes` are overrides of every run, and part of what a line is known by.
    """
    from fedtune.run.files import append_line

    for run in runs:
        if key_of(run, changes) not in finished(results):
            append_line(results, json.dumps(measured(run, material, changes), sort_keys=True))


def finished(results: Path) -> dict[str, Line]:
    """Return the lines of finished runs by their key."""
    from fedtune.run.files import read_lines

    return {line["key"]: line for line in read_lines(results)} if results.exists() else {}


def key_of(run: Run, changes: tuple[str, ...]) -> str:
    """Return what a run is known by: its words, so that a line of another setting never stands for it."""
    return " ".join((*run.words, *changes))


def measured(run: Run, material: Material, changes: tuple[str, ...]) -> Line:
    """Run one study and return its line."""
    from fedtune.config.compose import compose
    from fedtune.simulation.progress import NullProgress
    from fedtune.simulation.resolve import resolve
    from fedtune.simulation.runner import simulate

    folder, started = Path(tempfile.mkdtemp(prefix="comparison-")), time.process_time()
    try:
        words = ["experiment=aggregation", *material.words, *run.words, *changes, f"run.dir={folder / 'run'}"]
        study = resolve(compose(words))
        summary = simulate(study.plan, study.machine, NullProgress())
        rounds = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    finally:
        shutil.rmtree(folder)
    held_out = {site.name: site.held_out for site in study.sites}
    spent = {"cpu_seconds": round(time.process_time() - started, 2)}
    return {"key": key_of(run, changes), **results_of(summary, held_out), **costs_of(rounds), **spent}


def results_of(summary: Line, held_out: dict[str, int]) -> Line:
    """Return the accuracy on the test part, None without a global adapter, and that of all sites' held-out records."""
    final = {site["name"]: site["metrics"]["final"]["accuracy"] for site in summary["sites"]}
    records = sum(held_out[name] for name in final)
    metrics = summary["metrics"]
    return {
        "test_accuracy": metrics["final"]["accuracy"] if summary["released"] else None,
        "test_accuracy_before": metrics["initial"]["accuracy"] if summary["released"] else None,
        "site_accuracy": sum(held_out[name] * accuracy for name, accuracy in final.items()) / records,
        "epsilon": summary["privacy"]["max_epsilon"],
    }


def costs_of(rounds: list[Line]) -> Line:
    """Return bytes a round of all sites together, and the median seconds of the coordinator's own work in one.

    Bytes are the mean over as many odd as even rounds; neither the first nor one with an evaluation is among them.
    """
    counted = [line for line in rounds if line["round"] >= _FIRST_COUNTED and line["metrics"] is None] or rounds
    counted = counted[len(counted) % 2 if len(counted) > 1 else 0 :]
    return {
        "bytes_up": sum(line["bytes_up"] for line in counted) / len(counted),
        "bytes_down": sum(line["bytes_down"] for line in counted) / len(counted),
        "merging_seconds": median(line["merging_seconds"] for line in rounds),
        "failed": sum(len(line["failed"]) for line in rounds),
    }
