"""The coordinator's Flower app: opens the study, runs its rounds, releases the adapter."""

from __future__ import annotations

import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.aggregation.algorithms import get_algorithm
from fedtune.aggregation.averaging import TailAverage
from fedtune.config.machine import Machine, current
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.run.folder import RunFolder
from fedtune.simulation import observer
from fedtune.simulation.workspace import open_workspace
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.exchange import Exchange, Traffic
from fedtune_server.outcome import central_test, release
from fedtune_server.roll_call import call_roll, settle
from fedtune_server.rounds import Study, resume, run_rounds, start_optimizer
from fedtune_server.scorecard import Evaluator
from fedtune_server.witness import Witness

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one study from its plan, or continue it from its newest checkpoint."""
    plan = StudyPlan.from_json(str(context.run_config[PLAN_KEY]))
    started = time.monotonic()
    machine = current()
    study = open_study(grid, plan, machine)
    resume(study)
    study.facts.seconds += time.monotonic() - started
    study.progress.study_started(observer.study_info(plan, study.folder.path))
    run_rounds(study)
    settle(exchange=study.exchange, plan=plan, facts=study.facts)
    study.exchange.witness.export()
    release(study, machine)
    study.progress.study_done()


def open_study(grid: Grid, plan: StudyPlan, machine: Machine) -> Study:
    """Ask every connected node who it is, and put the study's parts together before its first round."""
    plan.promise.check()
    witness = Witness(machine.run, coordinator_key(machine.run / "coordinator.key"))
    exchange = Exchange(grid, plan.federation.deadline, Traffic(), witness)
    workspace = open_workspace(plan, machine)
    algorithm = get_algorithm(plan.aggregation.algorithm)
    download = algorithm.download(workspace.layout).names
    nodes, facts = call_roll(exchange, plan)
    return Study(
        plan=plan,
        layout=workspace.layout,
        algorithm=algorithm,
        exchange=exchange,
        nodes=nodes,
        folder=RunFolder(machine.run),
        progress=observer.current(),
        evaluator=Evaluator(plan, exchange, download, central_test(plan, machine, workspace)),
        adapter=dict(workspace.initial),
        optimizer=start_optimizer(plan, workspace.layout, workspace.initial),
        average=TailAverage(workspace.layout, plan.aggregation.average_last),
        facts=facts,
    )
