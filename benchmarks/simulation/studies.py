"""The two studies that are measured: any number of sites that train nothing, and a small real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.simulation.data import banking77
from fedtune.config.compose import compose
from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.simulation.resolve import Resolved, resolve
from tests.support.tiny import bank_csv, tiny_base

REAL_SITES = 4
_TRIVIAL = [
    "data.text=text",
    "data.label=category",
    "model.head=pooled",
    "model.head_init=zero",
    "evaluation.site_metrics=off",
    "training.sampling_rate=1",
    "training.local_steps=1",
    "federation.sites=2",
    "privacy.delta=1e-5",
    "run.threads=1",
    "run.device=cpu",
]
_REAL = [
    "data.text=text",
    "data.label=category",
    "data.max_tokens=64",
    "privacy.epsilon=8",
    "privacy.delta=1e-5",
    "training.sampling_rate=0.1",
    "training.local_steps=10",
    "training.learning_rate=0.5",
    "training.head_learning_rate=0.5",
    "training.physical_batch=32",
    "aggregation.algorithm=fedit",
    "aggregation.server_optimizer=fedavg",
    "evaluation.site_metrics=off",
    f"federation.sites={REAL_SITES}",
    "run.device=cpu",
]


def trivial_study(folder: Path, sites: int, rounds: int, backend: str) -> tuple[StudyPlan, Machine]:
    """Return a private study of a random model with one small layer, of any number of sites."""
    base, records = tiny_base(folder / "base"), bank_csv(folder / "records.csv")
    paths = [f"model.base={base}", f"data.path={records}", f"run.dir={folder / 'run'}"]
    found = resolve(compose([*_TRIVIAL, *paths, f"federation.rounds={rounds}", f"run.backend={backend}"]))
    plan = found.plan.model_dump(mode="json")
    plan["federation"]["sites"] = sites
    return StudyPlan.model_validate(plan), found.machine


def real_study(folder: Path, settings: dict[str, Any]) -> Resolved:
    """Return a private study of MiniLM on rows of BANKING77, resolved as the command line would."""
    numbers = [
        f"data.limit={settings['rows']}",
        f"federation.rounds={settings['rounds']}",
        f"run.threads={settings['threads']}",
    ]
    return resolve(compose([*_REAL, f"data.path={banking77().resolve()}", f"run.dir={folder / 'run'}", *numbers]))
