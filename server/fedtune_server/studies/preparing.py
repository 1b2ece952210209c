"""What a plan needs on the coordinator's machine: which sites, which base model, which test file, what computes.

A plan names all of them by content or by name; `coordinator.yaml` and the enrolment say what that is here. Knows no
command and writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.config.schema import ModelSettings
from fedtune.data.formats import read_table
from fedtune.data.records import to_records
from fedtune.errors import ConfigError, EnrolmentError, FedtuneError, ModelError, StudyError
from fedtune.model.base import BaseModel, find_base
from fedtune_server.enrolment_state import Member
from fedtune_server.settings import CoordinatorSettings


def choose_sites(plan: StudyPlan, members: Collection[Member], named: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the sites that take part: those that are named, else all that are enrolled.

    Errors: `enrolment.not-enrolled`, `study.site-count` unless they are as many as the plan says.
    """
    enrolled = {member.site for member in members if member.revoked is None}
    for site in named:
        if site not in enrolled:
            hint = f"enrolled are {', '.join(sorted(enrolled)) or 'none'}; invite it: fedtune server enrol add {site}"
            raise EnrolmentError("not-enrolled", f"the site {site} is not enrolled", hint=hint)
    sites = tuple(sorted(set(named) or enrolled))
    wanted = plan.federation.sites
    if len(sites) == wanted:
        return sites
    whose = "are named" if named else "are enrolled"
    message = f"the plan is for {wanted} sites, and {len(sites)} {whose} ({', '.join(sites) or 'none'})"
    raise StudyError("site-count", message, hint=_way_out(wanted, sites, enrolled))


def _way_out(wanted: int, sites: Sequence[str], enrolled: Collection[str]) -> str:
    if len(enrolled) >= wanted:
        return f"name {wanted} of them: --sites {','.join(sorted(enrolled)[:wanted])}"
    anew = f"; or resolve a plan for {len(sites)}: federation.sites={len(sites)}" if sites else ""
    return f"enrol {wanted - len(enrolled)} more: fedtune server enrol add SITE{anew}"


def find_model(plan: StudyPlan, settings: CoordinatorSettings) -> BaseModel:
    """Return the base model whose content is the plan's, among those that `coordinator.yaml` names.

    Error: `model.unknown-base`, which names all that were looked through.
    """
    wanted, seen = plan.model, []
    for name in sorted(settings.models, key=lambda name: (name != wanted.name, name)):
        place = settings.models[name]
        try:
            base = find_base(ModelSettings(base=place))
        except FedtuneError as error:
            seen.append(f"{name} ({place}): {error.message}")
            continue
        if base.sha256 == wanted.sha256:
            return base
        seen.append(f"{name} ({place}): SHA-256 {base.sha256[:12]}…")
    looked = "\n  ".join(["it names", *seen]) if seen else "it names none"
    message = f"coordinator.yaml has no base model {wanted.name} with SHA-256 {wanted.sha256[:12]}…: {looked}"
    raise ModelError("unknown-base", message, hint=f"fetch it, and add its folder as models.{wanted.name}")


def find_test(plan: StudyPlan, settings: CoordinatorSettings) -> Path | None:
    """Return the coordinator's own test file for the plan's data set, or None; its records must be the task's.

    Errors: those of reading records.
    """
    path = settings.tests.get(plan.data.name)
    if path is not None:
        to_records(read_table(str(path), "auto", columns=plan.task.used), plan.task)
    return path


def machine_for(place: Path, base: BaseModel, test: str | None, settings: CoordinatorSettings) -> Machine:
    """Return the facts with which the coordinator opens a study. Error: `config.no-cuda`."""
    return Machine(
        run_dir=str(place.absolute()),
        model_folder=str(base.folder),
        test_path=test,
        device=_device(settings.device),
        threads=settings.threads or os.cpu_count() or 1,
    )


def _device(wanted: str) -> str:
    if wanted == "cpu":
        return "cpu"
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        hint = "device: cpu in coordinator.yaml"
        raise ConfigError("no-cuda", "coordinator.yaml says device: cuda, but torch finds no GPU", hint=hint)
    return "cuda" if has_gpu else "cpu"
