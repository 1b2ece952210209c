"""The same training as a script would do it: one loop over rounds and sites, a NumPy mean, no messages, no files.

Uses fedtune's model, data and local round, so that what differs is the federation alone: Flower, messages, checks,
accounting of what was spent, checkpoints, run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from benchmarks.simulation.rounds import RoundClock
from fedtune.aggregation.assembly import assemble
from fedtune.aggregation.lora.protocol import Turn
from fedtune.config.plan import StudyPlan
from fedtune.journal.ledger import Reservation
from fedtune.model.layout import AdapterState
from fedtune.model.workspace import Workspace
from fedtune.run.folder import RunFolder
from fedtune.simulation.sites import SiteData, dealt
from fedtune.simulation.workspace import open_workspace
from fedtune.training.local import Assignment, LocalResult, event_of_round, train_round
from tests.support.ledgers import charge_of, ledger


def train_plainly(run: Path, folder: Path, started: float) -> dict[str, Any]:
    """Train the plan of a run folder, save the adapter as one file, and return seconds by part."""
    plan, machine = RunFolder(run).plan(), RunFolder(run).machine()
    workspace = open_workspace(plan, machine)
    data = dealt(plan.json_text, machine, workspace.tokenizer)
    sites = [data.site(index) for index in range(plan.federation.sites)]
    adapter, clock = dict(workspace.initial), RoundClock(len(sites))
    reserving = time.perf_counter()
    reservations = _reserve(plan)
    started += time.perf_counter() - reserving  # a loop without privacy would not have it
    train = clock.timed(train_round)
    clock.start()
    for number in range(1, plan.federation.rounds + 1):
        adapter = _round(plan, workspace, zip(sites, reservations[number - 1], strict=True), number, adapter, train)
        clock.lap()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter.safetensors").write_bytes(save(adapter))
    return clock.parts(started)


def _reserve(plan: StudyPlan) -> list[list[Reservation]]:
    """Return what `train_round` asks for, charged to a throw-away journal before the clock runs."""
    rounds, sites, event = plan.federation.rounds, plan.federation.sites, event_of_round(plan)
    with ledger() as opened:
        return [
            [opened.reserve(charge_of(plan, number, event, f"{site:064x}"), ()) for site in range(sites)]
            for number in range(1, rounds + 1)
        ]


def _round(
    plan: StudyPlan,
    workspace: Workspace,
    sites: Iterable[tuple[SiteData, Reservation]],
    number: int,
    adapter: dict[str, Any],
    train: Callable[..., LocalResult],
) -> dict[str, Any]:
    algorithm = assemble(plan.aggregation, plan.training, plan.lora, plan.seed)
    layout = algorithm.site.trained(workspace.layout, Turn(number))
    states: list[AdapterState] = []
    for site, reservation in sites:
        assignment = Assignment(site.name, number, adapter, reservation)
        states.append(train(plan, workspace, site.train, assignment, (layout, layout)).state)
    return {
        name: np.mean([state[name] for state in states], axis=0, dtype=np.float64).astype(np.float32)
        for name in adapter
    }
