"""A release in use: its plan, and where its base model is on this machine.

What is used is checked first: a file that nobody has signed is not loaded. The base is found by its content, not by its
name alone. Knows no metric.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.config.schema import ModelSettings
from fedtune.errors import ModelError, ReleaseError
from fedtune.model.base import find_base
from fedtune.release.files import MANIFEST_FILE
from fedtune.release.verify import verify_release

ENVIRONMENT_VARIABLE = "FEDTUNE_MODELS"


@dataclass(frozen=True, slots=True)
class UsedRelease:
    """A release that was checked: its plan, what it says of privacy, and what of this machine it needs."""

    folder: Path
    plan: StudyPlan
    statement: str
    machine: Machine


def is_release(folder: Path) -> bool:
    """Whether a folder is a release, and not a run."""
    return (folder / MANIFEST_FILE).is_file()


def open_release(folder: Path, base: Path | None, machine: dict[str, Any]) -> UsedRelease:
    """Open an adapter that was released; `machine` says on what to compute.

    Errors: `release.does-not-hold`, `release.not-peft`, `release.no-base` where this machine has no base of that
    content.
    """
    verdict = verify_release(folder)
    if verdict.manifest is None or not verdict.holds:
        found = verdict.findings[0]
        message = f"{folder} is not used: {found.subject}: {found.text} ({found.code})"
        raise ReleaseError("does-not-hold", message, hint=f"fedtune release verify {folder}")
    if verdict.manifest.kind != "peft":
        message = f"{folder} is a release for other programs ({verdict.manifest.kind})"
        raise ReleaseError("not-peft", message, hint="name the run, or a release that was made with --to peft")
    plan = StudyPlan.from_json(verdict.manifest.plan)
    found_base = _find_base(plan, base)
    facts = Machine(run_dir=str(folder), model_folder=str(found_base), **machine)
    return UsedRelease(folder, plan, str(verdict.manifest.privacy.get("statement", plan.promise.statement)), facts)


def _find_base(plan: StudyPlan, given: Path | None) -> Path:
    """Return the folder of the plan's base: the one given, or the first of its name with its content."""
    wanted = plan.model
    for place in _candidates(wanted.name) if given is None else [str(given)]:
        try:
            found = find_base(ModelSettings(base=place))
        except ModelError:
            if given is not None:
                raise
            continue
        if found.sha256 == wanted.sha256:
            return found.folder
    message = f"the base model {wanted.name} with the content {wanted.sha256[:16]}… is not on this machine"
    if given is not None:
        message = f"{given} is not the base model {wanted.name} that the release is for"
    raise ReleaseError("no-base", message, hint="name its folder: --base FOLDER")


def _candidates(name: str) -> list[str]:
    """Return where a base of this name may be: below FEDTUNE_MODELS, here, an installed package, the Hub's cache."""
    models = os.environ.get(ENVIRONMENT_VARIABLE)
    folders = [Path(models) / name.rsplit("/", 1)[-1]] if models else []
    here = [Path(name.rsplit("/", 1)[-1]).resolve()]
    return [*(str(path) for path in [*folders, *here] if path.is_dir()), f"package:{name}", name]
