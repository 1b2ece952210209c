"""The coordinator's Flower app: opens the study, runs its rounds, releases the adapter.

In a simulation the run folder is the one that the machine facts name, and the sites are parts of this process. Between
machines everything is in the coordinator's folder (`fedtune_server.coordinator`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.aggregation.averaging import TailAverage
from fedtune.config.machine import Machine, current
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.run.folder import RunFolder
from fedtune.simulation import observer
from fedtune.simulation.workspace import open_workspace
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.exchange import Exchange, Traffic
from fedtune_server.folder import ENVIRONMENT_VARIABLE, CoordinatorFolder
from fedtune_server.merging import Merging
from fedtune_server.outcome import central_test, release
from fedtune_server.roll_call import call_roll, settle
from fedtune_server.rounds import run_rounds
from fedtune_server.scorecard import Evaluator
from fedtune_server.study import Study, averaged_layout, resume
from fedtune_server.witness import Witness

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one study from its plan, or continue it from its newest checkpoint."""
    plan = StudyPlan.from_json(str(context.run_config[PLAN_KEY]))
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if folder:
        from fedtune_server.coordinator import conducted

        with conducted(CoordinatorFolder(Path(folder)), plan, grid, context.run_id) as (machine, exchange, released):
            run_study(plan, machine, exchange, released)
        return
    machine = current()
    witness = Witness(machine.run, coordinator_key(machine.run / "coordinator.key"))
    run_study(plan, machine, Exchange(grid, plan.federation.deadline, Traffic(), witness))


def run_study(plan: StudyPlan, machine: Machine, exchange: Exchange, released: tuple[str, ...] = ()) -> None:
    """Run a study to its end; `released` names a site for each time that a person let it out of quarantine."""
    started = time.monotonic()
    study = open_study(plan, machine, exchange)
    resume(study, released)
    study.facts.seconds += time.monotonic() - started
    study.progress.study_started(observer.study_info(plan, study.folder.path))
    run_rounds(study)
    settle(exchange, plan, study.facts)
    exchange.witness.export()
    release(study, machine)
    study.progress.study_done()


def open_study(plan: StudyPlan, machine: Machine, exchange: Exchange) -> Study:
    """Ask every connected node who it is, and put the study's parts together before its first round."""
    plan.promise.check()
    workspace = open_workspace(plan, machine)
    merging = Merging.of(plan, workspace.layout, workspace.initial)
    state = merging.start()
    nodes, facts = call_roll(exchange, plan)
    return Study(
        plan=plan,
        merging=merging,
        exchange=exchange,
        nodes=nodes,
        folder=RunFolder(machine.run),
        progress=observer.current(),
        evaluator=Evaluator(plan, merging, exchange, central_test(plan, machine, workspace, merging)),
        state=state,
        average=TailAverage(averaged_layout(workspace.layout, state), plan.aggregation.average_last),
        facts=facts,
    )
