"""A real site's part of what a plan needs: the base model, found by the hash of its content, and what computes.

A model's name is for people: whatever a plan calls it, only a folder of `site.yaml` whose content has the plan's hash
is opened. A folder is hashed once a process, and again when a file in it has changed. Knows no policy and no record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fedtune.config.machine import Machine
from fedtune.config.plan import ModelPlan, StudyPlan
from fedtune.config.schema import ModelSettings
from fedtune.errors import ConfigError, ModelError
from fedtune.model.base import BaseModel, find_base
from fedtune_client.facts import FILE_NAME, SiteFacts
from fedtune_client.folder import SiteFolder


def machine_of(plan: StudyPlan, folder: SiteFolder) -> Machine:
    """Return the facts with which a plan's model is opened here; `site.yaml` is read again: a model can be added.

    Errors: `model.not-here` for a base that the site does not have, `config.no-cuda`.
    """
    facts = folder.facts()
    base = base_of(plan.model, facts)
    return Machine(
        run_dir=str(folder.run.absolute()),
        model_folder=str(base.folder),
        device=device_of(facts),
        threads=facts.service.threads or _threads_by_default(),
    )


def base_of(wanted: ModelPlan, facts: SiteFacts) -> BaseModel:
    """Return the site's base model with the content that a plan names. Error: `model.not-here`."""
    problems = []
    for name in _likely_first(wanted.name, facts):
        try:
            base = open_model(facts, name)
        except ModelError as error:
            problems.append(f"; {name} cannot be used: {error.message}")
            continue
        if base.sha256 == wanted.sha256:
            return base
    raise ModelError(
        "not-here",
        f"no model of {facts.folder / FILE_NAME} has the plan's content: {wanted.name} ({wanted.sha256})"
        + "".join(problems),
        hint=f"fetch it, and name its folder under models: in {FILE_NAME}; then: fedtune client doctor",
    )


def open_model(facts: SiteFacts, name: str) -> BaseModel:
    """Find, check and hash one of the site's models; the errors of `find_base`."""
    return find_base(ModelSettings(base=facts.models[name]))


def device_of(facts: SiteFacts) -> str:
    """Return what computes: `cpu` or `cuda`. Error: `config.no-cuda` where there is no GPU and one is wanted."""
    import torch

    wanted, found = facts.service.device, torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ConfigError("no-cuda", f"device: cuda in {FILE_NAME}, but torch finds no GPU", hint="device: cpu")
    return "cuda" if wanted != "cpu" and found else "cpu"


def _threads_by_default() -> int:
    """Return what OMP_NUM_THREADS says, or the number of cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else os.cpu_count() or 1


def _likely_first(name: str, facts: SiteFacts) -> Iterator[str]:
    """Yield the models, first those that are called, or whose folder is, as the plan's: hashing takes a while."""
    called = name.rpartition("/")[2]
    folders = {own: Path(where.removeprefix("package:")).name for own, where in facts.models.items()}
    yield from sorted(facts.models, key=lambda own: called not in {own, folders[own]})
