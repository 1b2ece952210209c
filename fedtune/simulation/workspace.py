"""Opens the plan's model on this machine, and refuses a base whose content is not the plan's."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from fedtune.aggregation.algorithms import get_algorithm
from fedtune.config.canonical import sha256_hex
from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.errors import ModelError
from fedtune.model.base import open_base
from fedtune.model.build import Recipe, build
from fedtune.model.layout import AdapterLayout
from fedtune.model.workspace import Workspace


def open_workspace(plan: StudyPlan, machine: Machine) -> Workspace:
    """Return the workspace of a plan; the base's content and the adapter's layout must be the plan's."""
    return _open_once(plan.json_text, machine)


@lru_cache(maxsize=1)
def _open_once(plan_json: str, machine: Machine) -> Workspace:
    plan = StudyPlan.from_json(plan_json)
    torch.set_num_threads(machine.threads)
    base = open_base(Path(machine.model_folder))
    if base.sha256 != plan.model.sha256:
        raise ModelError(
            "other-base", f"{base.folder} is not the plan's base model {plan.model.name}", hint="fetch the pinned model"
        )
    workspace = build(base, recipe_of(plan), machine.device)
    if layout_hash(workspace.layout) != plan.adapter.layout_sha256:
        raise ModelError(
            "other-layout", "the adapter has other tensors than the plan says", hint="use the pinned versions"
        )
    algorithm = get_algorithm(plan.aggregation.algorithm)
    parts = workspace.layout, *(part(workspace.layout) for part in (algorithm.trained, algorithm.upload))
    sizes = (*(part.size for part in parts), algorithm.download(workspace.layout).size)
    said = plan.adapter
    if sizes != (said.numbers, said.trained, said.upload, said.download):
        raise ModelError(
            "other-layout", "the adapter has another size than the plan says", hint="resolve it: fedtune plan"
        )
    return workspace


def recipe_of(plan: StudyPlan) -> Recipe:
    """Return the plan's words for the model."""
    training = plan.training
    return Recipe(
        plan.task,
        plan.lora,
        plan.model,
        plan.seed,
        plan.data.max_tokens,
        training.autocast,
        training.gradient_checkpointing,
    )


def layout_hash(layout: AdapterLayout) -> str:
    """Return the SHA-256 of the tensors' names and shapes."""
    return sha256_hex("\n".join(f"{spec.name} {spec.shape}" for spec in layout.tensors))
