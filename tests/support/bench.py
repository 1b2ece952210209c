"""One site of a small study on a tiny random model, for tests of what a site does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.aggregation.assembly import assemble
from fedtune.aggregation.lora.protocol import Turn
from fedtune.config.plan import StudyPlan
from fedtune.config.schema import Settings
from fedtune.privacy.plan import PrivacyPlan
from fedtune.simulation.resolve import resolve
from fedtune.simulation.sites import dealt
from fedtune.simulation.workspace import open_workspace
from fedtune.training.local import Assignment, LocalResult, train_round
from tests.support.ledgers import reserved
from tests.support.tiny import bank_csv, question_jsonl, tiny_base

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fedtune.config.machine import Machine
    from fedtune.data.templates import Example
    from fedtune.data.units import Units
    from fedtune.model.layout import AdapterLayout, AdapterState
    from fedtune.model.workspace import Workspace

# Every architecture with every head that its task knows.
CASES = [
    ("bert", "pooled"),
    ("bert", "architecture"),
    ("deberta", "pooled"),
    ("deberta", "architecture"),
    ("gpt2", "none"),
    ("gpt2", "pooled"),
    ("gpt2", "architecture"),
    ("llama", "none"),
    ("llama", "architecture"),
    ("gemma", "none"),
    ("gemma", "pooled"),
    ("qwen2", "none"),
    ("qwen2", "architecture"),
]


@dataclass(frozen=True, slots=True)
class Bench:
    """A plan, its model in memory and one site's examples."""

    plan: StudyPlan
    machine: Machine
    workspace: Workspace
    name: str
    examples: Sequence[Example]
    units: Units | None = None

    @property
    def layouts(self) -> tuple[AdapterLayout, AdapterLayout]:
        plan = self.plan
        algorithm = assemble(plan.aggregation, plan.training, plan.lora, plan.seed)
        trained = algorithm.site.trained(self.workspace.layout, Turn(1))
        return trained, trained

    @property
    def download(self) -> AdapterLayout:
        """What a site is sent that has nothing but the plan."""
        plan = self.plan
        algorithm = assemble(plan.aggregation, plan.training, plan.lora, plan.seed)
        return algorithm.down(self.workspace.layout, Turn(1), 0)

    def plan_with(self, **changes: Any) -> Bench:
        """Return the bench with other terms: `training__local_steps=3` sets `training.local_steps`."""
        return replace(self, plan=changed(self.plan, **changes))

    def round(self, number: int = 1, adapter: AdapterState | None = None, **fields: Any) -> LocalResult:
        """Train one round from an adapter (the study's start) with its event reserved."""
        site = fields.pop("site", self.name)
        start = self.workspace.initial if adapter is None else adapter
        reservation = fields.pop("reservation", None) or reserved(self.plan, number)
        assignment = Assignment(site, number, start, reservation, **fields)
        return train_round(self.plan, self.workspace, self.examples, assignment, self.layouts, self.units)

    def whole(self, result: LocalResult) -> AdapterState:
        """Return the adapter after a round, with the tensors that were not sent."""
        return {**self.workspace.initial, **result.state}

    def alive(self, seed: int = 0, scale: float = 0.1) -> AdapterState:
        """Return an adapter whose every tensor is random, as after some rounds."""
        generator = np.random.default_rng(seed)
        return {
            spec.name: (generator.normal(size=spec.shape) * scale).astype(np.float32)
            for spec in self.workspace.layout.tensors
        }


def make_bench(folder: Path, architecture: str = "bert", head: str = "pooled", *, seed: int = 0, **keys: Any) -> Bench:
    """Make a bench in `folder`; `keys` change the settings, as `training__local_steps=3`."""
    base = tiny_base(folder / "base", architecture, seed=seed) if not (folder / "base").exists() else folder / "base"
    settings = _settings(folder, base, head, keys)
    resolved = resolve(settings)
    workspace = open_workspace(resolved.plan, resolved.machine)
    site = dealt(resolved.plan.json_text, resolved.machine, workspace.tokenizer).site(0)
    units = None if resolved.plan.promise.unit == "record" else site.units
    return Bench(resolved.plan, resolved.machine, workspace, site.name, site.train, units)


def changed(plan: StudyPlan, **changes: Any) -> StudyPlan:
    """Return a plan with other values; ε stays as it was, because a site's round does not depend on it."""
    values = plan.model_dump(mode="json")
    for key, value in changes.items():
        _place(values, key, value)
    promise, steps = values["privacy"], values["federation"]["rounds"] * values["training"]["local_steps"]
    if promise["mode"] == "off":
        off = PrivacyPlan.off(sampling_rate=promise["sampling_rate"], max_steps=steps, clip_norm=promise["clip_norm"])
        values["privacy"] = off.to_dict() | {key: promise[key] for key in ("unit", "max_records_per_unit")}
    else:
        promise["max_steps"] = steps
    return StudyPlan.model_validate(values)


def summary_of(plan: StudyPlan, **metrics: float) -> dict[str, Any]:
    """Return what the release needs of a run's summary."""
    private = plan.promise.mode == "dp"
    return {
        "sites": [{"name": "site-0"}, {"name": "site-1"}],
        "privacy": {
            "mode": plan.promise.mode,
            "max_epsilon": plan.promise.forecast() if private else None,
            "delta": plan.promise.delta if private else None,
            "statement": plan.promise.statement,
        },
        "metrics": {"initial": dict.fromkeys(metrics, 0.25), "final": metrics},
    }


def _settings(folder: Path, base: Path, head: str, keys: Mapping[str, Any]) -> Settings:
    values: dict[str, Any] = {
        "seed": 7,
        "data": {"max_tokens": 24, "holdout": 0.2},
        "model": {"base": str(base)},
        "lora": {"rank": 2, "alpha": 4.0},
        "privacy": {"noise_multiplier": 0.7, "clip_norm": 0.5, "delta": 1e-5},
        "training": {"sampling_rate": 0.5, "local_steps": 2, "physical_batch": 4, "learning_rate": 0.3},
        "federation": {"sites": 2, "rounds": 2},
        "run": {"device": "cpu", "threads": 1, "dir": str(folder / "run")},
    }
    if head == "none":
        values["data"] |= {"path": str(question_jsonl(folder / "questions.jsonl", rows=60, patients=14))}
        values["data"] |= {"prompt": "prompt", "completion": "completion"}
    else:
        values["data"] |= {"path": str(bank_csv(folder / "bank.csv", rows=60, labels=3, patients=14))}
        values["data"] |= {"text": "text", "label": "category"}
        values["model"]["head"] = head
    for key, value in keys.items():
        _place(values, key, value)
    return Settings.model_validate(values)


def _place(values: dict[str, Any], key: str, value: Any) -> None:
    *groups, last = key.split("__")
    for group in groups:
        values = values.setdefault(group, {})
    values[last] = value
