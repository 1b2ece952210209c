"""From settings, task, base model and the sites' sizes to a study plan: what it says however these were found.

Knows no record and no file of records. Nothing is trained and nothing is written; the base model is loaded once, to
find the adapter's tensors.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.aggregation.assembly import assemble
from fedtune.aggregation.lora.protocol import Turn
from fedtune.aggregation.matrix import row_of
from fedtune.config.machine import Machine
from fedtune.config.plan import AdapterPlan, DataPlan, ModelPlan, StudyPlan
from fedtune.config.schema import DataSettings, PrivacySettings, Settings
from fedtune.data.tasks import Task
from fedtune.errors import AggregationError, ConfigError
from fedtune.model.base import BaseModel
from fedtune.model.build import Recipe, build
from fedtune.privacy.calibration import noise_of_share
from fedtune.privacy.plan import PrivacyPlan, default_delta, delta_warning
from fedtune.run.folder import default_path
from fedtune.simulation.workspace import adapter_plan
from fedtune.training.rehearsal import rehearse


@dataclass(frozen=True, slots=True)
class SiteSize:
    """One site's name, its public (rounded) number of units to train on, and how many records it holds out."""

    name: str
    units: int
    held_out: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A study that can be run: its plan, this machine's facts and what a person should know before.

    `sites` are those of a simulation; empty where the sites keep their sizes to themselves.
    """

    plan: StudyPlan
    machine: Machine
    base: BaseModel
    sites: tuple[SiteSize, ...]
    warnings: tuple[str, ...]


def complete(
    settings: Settings, task: Task, base: BaseModel, sites: tuple[SiteSize, ...] = (), scattered: int = 0
) -> Resolved:
    """Calibrate the noise, find the adapter's tensors and write the plan; without sites, `privacy.delta` must be set.

    `scattered` is how many privacy units have records at several sites.
    """
    wanted = settings.privacy
    privacy = replace(_privacy(settings, sites), engine=wanted.engine, clipping=wanted.clipping)
    privacy = privacy.about(wanted.unit, wanted.max_records_per_unit)
    _refuse_no_head(settings, task)
    machine = _machine(settings, base)
    plan = _plan(settings, task, base, privacy, machine)
    return Resolved(plan, machine, base, sites, _warnings(settings, privacy, sites, scattered))


def data_name(data: DataSettings) -> str:
    """Return what the plan calls the data set: the name that is set, or that of the file or the source."""
    if data.name is not None:
        return data.name
    stem = Path(data.path if data.source == "file" and data.path else data.source).name.split(".", 1)[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64] or "data"


def delta_of(wanted: PrivacySettings, sites: tuple[SiteSize, ...]) -> float:
    """Return the δ that is set, or the default for the largest site."""
    return default_delta(max(site.units for site in sites)) if wanted.delta is None else wanted.delta


def absolute(path: str | None) -> str | None:
    """Return an absolute path for a local file; a Hub id stays as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _privacy(settings: Settings, sites: tuple[SiteSize, ...]) -> PrivacyPlan:
    wanted, training = settings.privacy, settings.training
    steps, rate = settings.federation.rounds * training.local_steps, training.sampling_rate
    if wanted.mode == "off":
        clip_norm, sampler = wanted.clip_norm, training.sampler
        return PrivacyPlan.off(sampling_rate=rate, max_steps=steps, clip_norm=clip_norm, sampler=sampler)
    terms: dict[str, Any] = {
        "delta": delta_of(wanted, sites),
        "clip_norm": wanted.clip_norm,
        "sampling_rate": rate,
        "max_steps": steps,
        "sampler": training.sampler,
        "noise": wanted.noise,
    }
    if wanted.noise_multiplier is None:
        return PrivacyPlan.calibrated(epsilon=wanted.epsilon, **_measured(settings, wanted.epsilon, terms))
    alone = PrivacyPlan.from_noise(noise_multiplier=wanted.noise_multiplier, **terms)
    return PrivacyPlan.from_noise(noise_multiplier=wanted.noise_multiplier, **_measured(settings, alone.epsilon, terms))


def _measured(settings: Settings, epsilon: float, terms: dict[str, Any]) -> dict[str, Any]:
    """Add the noisy evaluations to the terms: as much noise as makes them use their share of (ε, δ)."""
    evaluation = settings.evaluation
    if evaluation.site_metrics != "noisy":
        return terms
    count = evaluation.count(settings.federation.rounds)
    sigma = noise_of_share(epsilon, terms["delta"], evaluation.budget_share, count)
    return terms | {"evaluations": count, "evaluation_noise_multiplier": sigma}


def _machine(settings: Settings, base: BaseModel) -> Machine:
    data, run = settings.data, settings.run
    return Machine(
        run_dir=str(Path(run.dir) if run.dir else default_path(run.root, settings.study.name)),
        model_folder=str(base.folder),
        data_path=absolute(data.path) if data.source == "file" else None,
        test_path=absolute(data.test),
        data_format=data.format,
        allow_download=settings.model.allow_download,
        device=_device(run.device),
        threads=run.threads or os.cpu_count() or 1,
        backend=run.backend,
        workers=run.workers,
    )


def _device(wanted: str) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no-cuda", "run.device=cuda, but torch finds no GPU", hint="run.device=cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _plan(settings: Settings, task: Task, base: BaseModel, privacy: PrivacyPlan, machine: Machine) -> StudyPlan:
    model = ModelPlan(
        name=base.name,
        sha256=base.sha256,
        architecture=base.architecture,
        head=_head(settings, task),
        head_init=settings.model.head_init,
        head_center=settings.model.head_center,
        head_scale=settings.model.head_scale,
        dtype=settings.model.dtype,
        attention=settings.model.attention,
        quantization=settings.model.quantization,
    )
    return StudyPlan(
        name=settings.study.name,
        purpose=settings.study.purpose,
        seed=settings.seed,
        data=_data_plan(settings, task),
        model=model,
        lora=settings.lora,
        adapter=_adapter_plan(settings, task, base, model, machine),
        privacy=privacy.to_dict(),
        training=settings.training,
        aggregation=settings.aggregation,
        federation=settings.federation,
        evaluation=settings.evaluation,
    )


def _data_plan(settings: Settings, task: Task) -> DataPlan:
    data = settings.data
    return DataPlan(
        name=data_name(data),
        source=data.source,
        task=task.to_dict(),
        max_tokens=data.max_tokens,
        holdout=data.holdout,
        limit=data.limit,
        partition=data.partition,
    )


def _adapter_plan(settings: Settings, task: Task, base: BaseModel, model: ModelPlan, machine: Machine) -> AdapterPlan:
    recipe = Recipe(
        task,
        settings.lora,
        model,
        settings.seed,
        settings.data.max_tokens,
        settings.training.autocast,
        settings.training.gradient_checkpointing,
        cores=settings.aggregation.algorithm == "fedsb",
    )
    workspace = build(base, recipe, machine.device)
    algorithm = assemble(settings.aggregation, settings.training, settings.lora, settings.seed)
    if settings.privacy.mode == "dp":
        for trained in dict.fromkeys(algorithm.site.trained(workspace.layout, Turn(number)) for number in (1, 2)):
            rehearse(workspace, trained, settings.privacy.engine)
    return adapter_plan(settings, workspace.layout)


def _refuse_no_head(settings: Settings, task: Task) -> None:
    if settings.aggregation.local_head and task.kind == "causal-lm":
        raise AggregationError(
            "no-head",
            "aggregation.local_head keeps a head at each site, and language modelling has none of its own",
            hint="aggregation.local_head=false, or aggregation.algorithm=fedsa for a factor that stays at the site",
        )


def _head(settings: Settings, task: Task) -> str:
    if task.kind == "causal-lm":
        return "none"
    return "pooled" if settings.model.head == "auto" else settings.model.head


def _warnings(settings: Settings, privacy: PrivacyPlan, sites: tuple[SiteSize, ...], scattered: int) -> tuple[str, ...]:
    found = []
    if privacy.mode == "off":
        found.append(privacy.statement)
    else:
        found.extend(note for note in [_delta_warning(privacy, sites)] if note)
        if privacy.noise == "seeded":
            found.append("Seeded noise: whoever knows the plan can remove it. For studies only, not for release.")
        if scattered:
            found.append(
                f"{scattered} units (values of {privacy.unit}) have records at several sites. Each site's promise "
                "covers its own records of a unit alone: what several sites reveal of it adds up, and one may train on "
                "what another holds out."
            )
    row = row_of(settings.aggregation.algorithm)
    personal = settings.aggregation.local_head or not row.traits.releases
    if personal:
        found.append("A part of the adapter stays at each site: the sites measure and export theirs, none is released.")
    if privacy.mode == "dp" and row.noise == "quadratic":
        found.append(
            f"{row.name} adds noise to both factors, so the noise in W = B·A is quadratic; fedsvd, ffa and fedsb add "
            "it to one."
        )
    if settings.evaluation.site_metrics == "off" and (settings.data.test is None or personal):
        found.append("No metric will be measured: evaluation.site_metrics=off and data.test is not set.")
    return tuple(found)


def _delta_warning(privacy: PrivacyPlan, sites: tuple[SiteSize, ...]) -> str | None:
    if sites:
        return delta_warning(privacy.delta, min(site.units for site in sites), privacy.noun)
    bound = f"{1 / privacy.delta:,.0f} {privacy.noun}s"
    return f"δ = {privacy.delta:g} protects only at sites of fewer than {bound}; their sizes are not known here."
