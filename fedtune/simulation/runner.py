"""Runs a resolved study in its run folder, or continues one: both halves of the federation, by Flower's references."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from fedtune.config import machine as machine_facts
from fedtune.config.machine import Machine
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.errors import RunError
from fedtune.flower.engine import check_backend, run
from fedtune.run.folder import RunFolder, create
from fedtune.simulation.observer import watched_by
from fedtune.simulation.progress import Progress

SERVER_APP = "fedtune_server.app:app"
CLIENT_APP = "fedtune_client.app:app"


def simulate(plan: StudyPlan, machine: Machine, progress: Progress) -> dict[str, Any]:
    """Run a study in a new run folder and return its summary."""
    return _execute(create(plan, machine), plan, machine, progress)


def continue_run(path: Path, progress: Progress) -> dict[str, Any]:
    """Continue an interrupted study from its newest checkpoint; a finished one just returns its summary."""
    folder = RunFolder(path)
    plan = folder.plan()
    machine = folder.machine().model_copy(update={"run_dir": str(path)})
    finished = folder.summary()
    if finished is not None:
        return finished
    check_backend(machine.backend)
    folder.save_machine(machine)
    return _execute(folder, plan, machine, progress)


def refuse_other_plan(path: Path, plan: StudyPlan) -> None:
    """Refuse to continue a run under another plan than its own."""
    own = RunFolder(path).plan()
    if own.sha256 != plan.sha256:
        raise RunError(
            "other-plan",
            f"{path} runs plan {own.sha256[:12]}…, the overrides describe plan {plan.sha256[:12]}…",
            hint=f"continue it as it is: fedtune simulate --resume {path}",
        )


def _execute(folder: RunFolder, plan: StudyPlan, machine: Machine, progress: Progress) -> dict[str, Any]:
    machine_facts.announce(folder.machine_file)
    config = {PLAN_KEY: plan.json_text}
    with folder.in_use(), watched_by(progress):
        try:
            run(
                machine.backend,
                _load(SERVER_APP),
                _load(CLIENT_APP),
                plan.federation.sites,
                config,
                workers=machine.workers,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"continue with `fedtune simulate --resume {folder.path}`") from None
        finally:
            progress.study_done()
    summary = folder.summary()
    if summary is None:
        raise RunError("unfinished", f"{folder.path} has no summary", hint=f"fedtune simulate --resume {folder.path}")
    return summary


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
