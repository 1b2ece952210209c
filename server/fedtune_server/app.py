"""The coordinator's Flower app: opens the study, runs its rounds, releases the adapter."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedtune.aggregation.algorithms import get_algorithm
from fedtune.aggregation.averaging import TailAverage
from fedtune.config.machine import Machine, current
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.errors import FederationError
from fedtune.flower.messages import Description, Instruction, Refusal, decode_description
from fedtune.run.folder import RunFolder
from fedtune.simulation import observer
from fedtune.simulation.workspace import open_workspace
from fedtune_server.exchange import Exchange, Traffic
from fedtune_server.facts import SiteFacts, StudyFacts
from fedtune_server.outcome import central_test, release
from fedtune_server.rounds import Study, resume, run_rounds, start_optimizer
from fedtune_server.scorecard import Evaluator

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
    study.facts.sites.update(_settled(study))
    release(study, machine)
    study.progress.study_done()


def open_study(grid: Grid, plan: StudyPlan, machine: Machine) -> Study:
    """Ask every connected node who it is, and put the study's parts together before its first round."""
    plan.promise.check()
    exchange = Exchange(grid, plan.federation.deadline, Traffic())
    workspace = open_workspace(plan, machine)
    algorithm = get_algorithm(plan.aggregation.algorithm)
    download = algorithm.download(workspace.layout).names
    nodes, facts = _describe(exchange, plan)
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


def _describe(exchange: Exchange, plan: StudyPlan) -> tuple[dict[str, int], StudyFacts]:
    """Return node ids and facts by site name; a node that does not describe itself takes no part."""
    nodes: dict[str, int] = {}
    found: dict[str, SiteFacts] = {}
    refused: list[str] = []
    for answer in exchange.ask(
        "query.describe", exchange.nodes(plan.federation.sites), Instruction(plan.sha256, 0, {}), _decoder(plan)
    ):
        if answer.reply is None or answer.reply.site in nodes:
            refused.append(answer.code or "message.duplicate-site")
            continue
        nodes[answer.reply.site] = answer.node
        found[answer.reply.site] = SiteFacts.of(answer.reply)
    if len(found) < plan.federation.sites and (
        not found or len(found) / plan.federation.sites < plan.federation.quorum
    ):
        causes = ", ".join(sorted(set(refused))) or "no answer"
        raise FederationError(
            "no-quorum",
            f"{len(found)} of {plan.federation.sites} sites are ready ({causes})",
            hint="run again with --verbose to see what the sites log",
        )
    return nodes, StudyFacts({name: found[name] for name in sorted(found)})


def _decoder(plan: StudyPlan) -> Callable[[Message], Description | Refusal]:
    return lambda message: decode_description(message.content, plan.sha256)


def _settled(study: Study) -> dict[str, SiteFacts]:
    """Ask once more what each site has spent: also rounds whose reply never arrived are in the final ε."""
    _, facts = _describe(study.exchange, study.plan)
    for name, site in facts.sites.items():
        study.facts.sites.setdefault(name, site).events = site.events
    return study.facts.sites
