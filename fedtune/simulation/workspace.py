"""Opens the plan's model on this machine, and refuses a base whose content is not the plan's."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from fedtune.aggregation.assembly import assemble, codec_of
from fedtune.aggregation.compatibility import check
from fedtune.aggregation.lora.factors import alpha_at
from fedtune.aggregation.sizes import sizes_of
from fedtune.config.canonical import sha256_hex
from fedtune.config.machine import Machine
from fedtune.config.plan import AdapterPlan, StudyPlan
from fedtune.config.schema import Settings
from fedtune.errors import ModelError
from fedtune.model.base import open_base
from fedtune.model.build import Recipe, build
from fedtune.model.layout import AdapterLayout
from fedtune.model.workspace import Workspace


def open_workspace(plan: StudyPlan, machine: Machine, rank: int = 0) -> Workspace:
    """Return the workspace of a plan; the base's content and the adapter's layout must be the plan's.

    `rank` is a site's own, at the plan's scale; 0 is the plan's. Workspaces of one plan's ranks are kept.
    """
    return _opened(plan.json_text, machine).at(rank or plan.lora.rank)


def open_released(plan: StudyPlan, machine: Machine, rank: int) -> Workspace:
    """Return the workspace of an adapter that was released: plain LoRA of any rank, at the plan's scale."""
    return _opened(plan.json_text, machine).at(rank, plain=True)


class _Workspaces:
    """The workspaces of one plan on one machine, by rank, made when they are first asked for."""

    def __init__(self, plan: StudyPlan, machine: Machine) -> None:
        check(plan)
        torch.set_num_threads(machine.threads)
        self._plan, self._device = plan, machine.device
        self._base = open_base(Path(machine.model_folder))
        if self._base.sha256 != plan.model.sha256:
            message = f"{self._base.folder} is not the plan's base model {plan.model.name}"
            raise ModelError("other-base", message, hint="fetch the pinned model")
        self._made: dict[Recipe, Workspace] = {}
        _check_planned(plan, self.at(plan.lora.rank).layout)

    def at(self, rank: int, *, plain: bool = False) -> Workspace:
        recipe = recipe_of(self._plan, rank, plain=plain)
        if recipe not in self._made:
            self._made[recipe] = build(self._base, recipe, self._device)
        return self._made[recipe]


@lru_cache(maxsize=1)
def _opened(plan_json: str, machine: Machine) -> _Workspaces:
    return _Workspaces(StudyPlan.from_json(plan_json), machine)


def _check_planned(plan: StudyPlan, layout: AdapterLayout) -> None:
    said = plan.adapter
    if layout_hash(layout) != said.layout_sha256:
        hint = "use the pinned versions"
        raise ModelError("other-layout", "the adapter has other tensors than the plan says", hint=hint)
    if adapter_plan(plan, layout) != said:
        hint = "resolve it: fedtune plan"
        raise ModelError("other-layout", "the adapter has another size than the plan says", hint=hint)


def adapter_plan(words: Settings | StudyPlan, layout: AdapterLayout) -> AdapterPlan:
    """Return what a plan with these words says of an adapter of this layout."""
    algorithm = assemble(words.aggregation, words.training, words.lora, words.seed)
    sites = words.federation.sites_per_round or words.federation.sites
    sizes = sizes_of(algorithm, codec_of(words.aggregation), layout, sites)
    return AdapterPlan(
        numbers=layout.size,
        trained=sizes.trained,
        upload=sizes.upload,
        upload_bytes=sizes.upload_bytes,
        download=sizes.download,
        layout_sha256=layout_hash(layout),
    )


def recipe_of(plan: StudyPlan, rank: int = 0, *, plain: bool = False) -> Recipe:
    """Return the plan's words for the model, at another rank at the same scale; `plain` is without `fedsb`'s cores."""
    training, lora = plan.training, plan.lora
    if rank not in {0, lora.rank}:
        lora = lora.model_copy(update={"rank": rank, "alpha": alpha_at(lora.alpha, lora.rank, rank)})
    return Recipe(
        plan.task,
        lora,
        plan.model,
        plan.seed,
        plan.data.max_tokens,
        training.autocast,
        training.gradient_checkpointing,
        cores=plan.aggregation.algorithm == "fedsb" and not plain,
    )


def layout_hash(layout: AdapterLayout) -> str:
    """Return the SHA-256 of the tensors' names and shapes."""
    return sha256_hex("\n".join(f"{spec.name} {spec.shape}" for spec in layout.tensors))
