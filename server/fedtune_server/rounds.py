"""A study, round by round: … (Flower message) → validate → Aggregate → server optimiser → Adapter → Scorecard.

One bad or silent site never ends a round: its reply is refused, named and counted, and the round goes on while a quorum
answers. A site whose replies are such as no honest site sends is quarantined. After each round everything that a
resumed study needs is in one checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field

from fedtune.aggregation.mean import StreamingMean
from fedtune.aggregation.weights import site_weights
from fedtune.config.plan import StudyPlan
from fedtune.errors import FederationError, FedtuneError
from fedtune.flower.messages import Instruction, Update, decode_update
from fedtune.run.folder import RunFolder
from fedtune.simulation.progress import RoundInfo
from fedtune_server.exchange import Answer
from fedtune_server.replies import check_update
from fedtune_server.roll_call import welcome
from fedtune_server.selection import sites_of_round
from fedtune_server.study import Study

logger = logging.getLogger("fedtune.coordinator")


@dataclass(slots=True)
class _Round:
    """One round as it goes: who was selected and who could be asked, the mean so far, the codes of the rest."""

    number: int
    selected: int
    mean: StreamingMean
    asked: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    done: int = 0


def run_rounds(study: Study) -> None:
    """Run every round that is left."""
    if study.round == 0:
        study.facts.initial = study.evaluator.measure(study.facts, study.nodes, 0, study.adapter, initial=True)
    for number in range(study.round + 1, study.plan.federation.rounds + 1):
        welcome(study)
        _run_round(study, number)


def _run_round(study: Study, number: int) -> None:
    started = time.monotonic()
    current = _begin(study, number)
    study.progress.round_started(number, len(current.asked))
    before = (study.exchange.traffic.up, study.exchange.traffic.down)
    _collect(study, current)
    _require_quorum(study.plan, current)
    study.adapter, study.optimizer = study.algorithm.step(
        study.plan.aggregation, study.layout, study.adapter, current.mean.result(), study.optimizer
    )
    study.average.push(study.adapter)
    study.round = number
    metrics = _measure(study, number)
    seconds = time.monotonic() - started
    study.facts.seconds += seconds
    study.facts.bytes_up, study.facts.bytes_down = study.exchange.traffic.up, study.exchange.traffic.down
    result = _result(study, current, before, metrics, seconds)
    study.exchange.witness.save()
    _log(study.folder, result, metrics)  # before the checkpoint: a line without one is dropped on resume
    study.save()
    study.progress.round_done(result)


def _begin(study: Study, number: int) -> _Round:
    """Select the round's sites. One that rests is not selected, one in quarantine counts as missing."""
    resting = {name for name, site in study.facts.sites.items() if number <= site.rests_until}
    selected = [name for name in sites_of_round(study.plan, study.names, number) if name not in resting]
    current = _Round(number, len(selected), StreamingMean(study.algorithm.upload(study.layout)))
    for name in selected:
        site = study.facts.sites.get(name)
        if site is not None and site.quarantine:
            continue
        if site is not None and name in study.nodes:
            current.asked.append(name)
        else:
            _fail(study, current, name, study.facts.refused.get(name, "federation.offline"))
    return current


def _collect(study: Study, current: _Round) -> None:
    """Add each valid update to the mean as it comes, until all have answered, enough have, or the time is over."""
    down, share = study.algorithm.download(study.layout), study.plan.federation.early_close
    adapter = {name: study.adapter[name] for name in down.names}
    instruction = Instruction(study.plan.sha256, current.number, adapter)
    site_of = {study.nodes[name]: name for name in current.asked}
    wanted = math.inf if share is None else math.ceil(share * current.selected)
    weights = site_weights(study.plan.aggregation, study.names)
    answers = study.exchange.ask(
        "train",
        list(site_of),
        instruction,
        lambda content: decode_update(content, study.plan.sha256),
        enough=lambda: current.done >= wanted,
    )
    for answer in answers:
        _take(study, current, site_of[answer.node], answer, weights)


def _take(study: Study, current: _Round, name: str, answer: Answer[Update], weights: dict[str, float]) -> None:
    """Add one update to the mean, or note why it does not count."""
    site, update = study.facts.sites[name], answer.reply
    if update is None:
        _fail(study, current, name, answer.code, offence=answer.offence)
        return
    try:
        upload = study.algorithm.upload(study.layout)
        check_update(study.plan, update, site, number=current.number, upload=upload, reference=study.adapter)
        current.mean.add(update.state, weights[name])
    except FedtuneError as error:
        _fail(study, current, name, error.code, offence=True)
        return
    site.events = update.events
    site.rounds += 1
    current.done += 1
    study.progress.site_done(name)


def _fail(study: Study, current: _Round, name: str, code: str, *, offence: bool = False) -> None:
    """Note why a site has no part in a round, and what follows for the next ones."""
    current.failed[name] = code
    study.progress.site_failed(name, code)
    logger.warning("round %d: %s has no part: %s", current.number, name, code)
    site = study.facts.sites.get(name)
    if site is None:
        return
    site.note_failure(code)
    if code == "federation.deadline":
        site.rests_until = current.number + study.plan.federation.straggler_rest
    if offence:
        site.note_offence(code, study.plan.federation.bad_replies)
        if site.quarantine:
            logger.warning("%s is not asked any more: %s", name, code)


def _require_quorum(plan: StudyPlan, current: _Round) -> None:
    needed = max(1, math.ceil(plan.federation.quorum * current.selected))
    if current.done >= needed:
        return
    causes = ", ".join(f"{name}: {code}" for name, code in sorted(current.failed.items())[:5])
    raise FederationError(
        "no-quorum",
        f"round {current.number}: {current.done} of {current.selected} sites answered, {needed} are needed ({causes})",
        hint="mend the sites; a coordinator then goes on by itself, a simulation with fedtune simulate --resume RUN",
    )


def _measure(study: Study, number: int) -> dict[str, float] | None:
    if not study.plan.evaluation.measures(number, study.plan.federation.rounds):
        return None
    metrics = study.evaluator.measure(study.facts, study.nodes, number, study.released)
    study.facts.final = metrics
    return metrics


def _result(
    study: Study, current: _Round, before: tuple[int, int], metrics: dict[str, float] | None, seconds: float
) -> RoundInfo:
    spent = study.facts.max_epsilon(study.plan.promise)
    up, down = study.exchange.traffic.up - before[0], study.exchange.traffic.down - before[1]
    shown = None if metrics is None else metrics.get(study.evaluator.headline)
    failed = dict(current.failed)
    return RoundInfo(current.number, current.selected, current.done, failed, spent, shown, seconds, up, down)


def _log(folder: RunFolder, result: RoundInfo, metrics: dict[str, float] | None) -> None:
    folder.log_metrics(
        {
            "round": result.number,
            "asked": result.asked,
            "failed": dict(result.failed),
            "epsilon": result.epsilon_spent,
            "metrics": metrics,
            "seconds": round(result.seconds, 6),
            "bytes_up": result.bytes_up,
            "bytes_down": result.bytes_down,
        }
    )
