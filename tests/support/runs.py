"""Whole studies on tiny models: in this process, or as `fedtune` in a process of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.journal_lines import entries
from tests.support.tiny import bank_csv, tiny_base

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("FEDTUNE_MODELS", ROOT.parent / "shared" / "models"))


@dataclass(frozen=True, slots=True)
class Study:
    """A folder with a tiny model `base`, a file `bank.csv`, and `runs` for run folders."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def data(self) -> Path:
        return self.folder / "bank.csv"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def words(self, *changes: str) -> list[str]:
        """Return the overrides of a small study with privacy, two labels, three sites, two rounds; `changes` win."""
        return [
            f"data.path={self.data}",
            "data.text=text",
            "data.label=category",
            "data.max_tokens=24",
            f"model.base={self.base}",
            "model.head_init=zero",
            "model.head_scale=10",
            "lora.rank=2",
            "lora.alpha=4",
            "privacy.clip_norm=1",
            "training.sampling_rate=0.5",
            "training.learning_rate=0.5",
            "training.head_learning_rate=null",
            "training.noise_limit=null",
            "aggregation.server_optimizer=fedavg",
            "federation.sites=3",
            "federation.rounds=2",
            "run.threads=1",
            "run.device=cpu",
            f"run.root={self.runs}",
            *changes,
        ]


def make_study(folder: Path, *, rows: int = 60, **sizes: Any) -> Study:
    """Make the model and the file of a small study."""
    study = Study(folder)
    tiny_base(study.base, **sizes)
    bank_csv(study.data, rows=rows)
    return study


@dataclass(frozen=True, slots=True)
class Done:
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


def command(*arguments: str) -> Done:
    """Run one command line in this process."""
    from fedtune.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return Done(code, out.getvalue(), err.getvalue())


def summary_of(*arguments: str) -> dict[str, Any]:
    """Simulate in this process and return the summary; anything but success is an error here."""
    done = command("simulate", *arguments, "--format", "json")
    assert done.code == 0, done.err
    result: dict[str, Any] = done.json
    return result


def process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start `fedtune` in a process of its own."""
    places = [str(ROOT), str(ROOT / "server"), str(ROOT / "client"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fedtune.cli", *arguments],
        env=environment | options.pop("env", {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_process(*arguments: str, **options: Any) -> Done:
    """Run `fedtune` in a process of its own to its end."""
    running = process(*arguments, **options)
    out, err = running.communicate(timeout=240)
    return Done(running.returncode, out, err)


def released(run: Path) -> dict[str, bytes]:
    """Return the bytes of the released tensors by file."""
    return {path.name: path.read_bytes() for path in sorted((run / "adapter").glob("*.safetensors"))}


def events(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what each site's journal has charged."""
    journals = sorted((run / "sites").glob("*/*.journal"))
    return {path.parent.name: entries(path, "reserve") for path in journals}


def metric_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
