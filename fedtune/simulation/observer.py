"""Who watches the study that runs in this process: the command sets it, the coordinator's loop reports to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.config.plan import StudyPlan
from fedtune.simulation.progress import NullProgress, Progress, StudyInfo

_watching: list[Progress] = []


def current() -> Progress:
    """Return who watches, or one who looks away."""
    return _watching[-1] if _watching else NullProgress()


@contextmanager
def watched_by(progress: Progress) -> Iterator[None]:
    """Report to `progress` inside the block."""
    _watching.append(progress)
    try:
        yield
    finally:
        _watching.pop()


def study_info(plan: StudyPlan, run_dir: Path) -> StudyInfo:
    """Return what progress shows of a plan."""
    private = plan.promise.mode == "dp"
    return StudyInfo(
        name=plan.name,
        rounds=plan.federation.rounds,
        sites=min(plan.federation.sites, plan.federation.sites_per_round or plan.federation.sites),
        epsilon_target=plan.promise.epsilon if private else None,
        delta=plan.promise.delta,
        metric_name="accuracy" if plan.task.kind == "classification" else "loss",
        not_private=not private,
        not_for_release=private and plan.promise.noise == "seeded",
        run_dir=str(run_dir),
        one_unit=plan.promise.one_unit,
    )
