"""A study, round by round: … (Flower message) → validate → Aggregate → server optimiser → Adapter → Scorecard.

One bad or silent site never ends a round: its reply is refused, named and counted, and the round goes on while a quorum
answers. After each round everything that a resumed study needs is in one checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedtune.aggregation.algorithms import Algorithm, get_algorithm
from fedtune.aggregation.averaging import TailAverage
from fedtune.aggregation.mean import StreamingMean
from fedtune.aggregation.server_optimizers import OptimizerState
from fedtune.aggregation.validation import validate
from fedtune.aggregation.weights import site_weights
from fedtune.config.plan import StudyPlan
from fedtune.errors import FederationError, FedtuneError, MessageError
from fedtune.flower.messages import Instruction, Update, decode_update
from fedtune.model.layout import AdapterLayout, AdapterState
from fedtune.privacy.accounting import Event
from fedtune.run.folder import RunFolder
from fedtune.simulation.progress import Progress, RoundInfo
from fedtune_server.checkpoint import Checkpoint, latest_checkpoint, restore_average, save_checkpoint
from fedtune_server.exchange import Answer, Exchange
from fedtune_server.facts import SiteFacts, StudyFacts
from fedtune_server.scorecard import Evaluator
from fedtune_server.selection import sites_of_round

_MOST_REPEATS = 100


@dataclass(slots=True)
class Study:
    """A running study: the fixed parts, then the state that each round replaces."""

    plan: StudyPlan
    layout: AdapterLayout
    algorithm: Algorithm
    exchange: Exchange
    nodes: dict[str, int]
    folder: RunFolder
    progress: Progress
    evaluator: Evaluator
    adapter: AdapterState
    optimizer: OptimizerState
    average: TailAverage
    facts: StudyFacts
    round: int = 0

    @property
    def released(self) -> AdapterState:
        """The adapter as it would be released now: the mean of the last `average_last` rounds."""
        return self.average.result() if self.round else self.adapter


def start_optimizer(plan: StudyPlan, layout: AdapterLayout, adapter: AdapterState) -> OptimizerState:
    """Return the server optimiser's state before the first round."""
    return get_algorithm(plan.aggregation.algorithm).start(plan.aggregation, layout, adapter)


def resume(study: Study) -> None:
    """Continue from the newest checkpoint, if there is one; what sites have spent since then is kept."""
    checkpoint = latest_checkpoint(study.folder.checkpoints, study.plan.sha256)
    study.folder.rewind_metrics(0 if checkpoint is None else checkpoint.round)
    if checkpoint is None:
        return
    described, refused = study.facts.sites, study.facts.refused
    study.round, study.adapter, study.optimizer = checkpoint.round, checkpoint.adapter, checkpoint.optimizer
    restore_average(study.average, checkpoint)
    study.facts = StudyFacts.from_dict(checkpoint.facts)
    study.facts.refused = refused
    for name in refused.keys() & study.facts.sites.keys():
        study.facts.sites[name].note_failure(refused[name])
    study.exchange.traffic.up, study.exchange.traffic.down = study.facts.bytes_up, study.facts.bytes_down
    for name, site in described.items():
        known = study.facts.sites.setdefault(name, site)
        if known.data_sha256 != site.data_sha256:
            raise FederationError(
                "other-data", f"{name} holds other records than when the study began", hint="start a new run"
            )
        known.events = site.events


def run_rounds(study: Study) -> None:
    """Run every round that is left."""
    if study.round == 0:
        study.facts.initial = study.evaluator.measure(study.facts, study.nodes, 0, study.adapter, initial=True)
    for number in range(study.round + 1, study.plan.federation.rounds + 1):
        _run_round(study, number)


def _run_round(study: Study, number: int) -> None:
    started = time.monotonic()
    asked = [name for name in sites_of_round(study.plan, sorted(study.facts.sites), number) if name in study.nodes]
    study.progress.round_started(number, len(asked))
    before = (study.exchange.traffic.up, study.exchange.traffic.down)
    mean, failed = _collect(study, number, asked)
    _require_quorum(study.plan, asked, failed, number)
    study.adapter, study.optimizer = study.algorithm.step(
        study.plan.aggregation, study.layout, study.adapter, mean.result(), study.optimizer
    )
    study.average.push(study.adapter)
    study.round = number
    metrics = _measure(study, number)
    seconds = time.monotonic() - started
    study.facts.seconds += seconds
    study.facts.bytes_up, study.facts.bytes_down = study.exchange.traffic.up, study.exchange.traffic.down
    result = _result(study, asked, failed, before, metrics, seconds)
    study.exchange.witness.save()
    _log(study.folder, result, metrics)  # before the checkpoint: a line without one is dropped on resume
    _save(study)
    study.progress.round_done(result)


def _collect(study: Study, number: int, asked: list[str]) -> tuple[StreamingMean, dict[str, str]]:
    """Add each valid update to the mean as it comes; return the codes of the rest."""
    upload = study.algorithm.upload(study.layout)
    weights = site_weights(study.plan.aggregation, sorted(study.facts.sites))
    down = study.algorithm.download(study.layout)
    instruction = Instruction(study.plan.sha256, number, {name: study.adapter[name] for name in down.names})
    mean, failed = StreamingMean(upload), {}
    site_of = {study.nodes[name]: name for name in asked}
    decode = lambda message: decode_update(message.content, study.plan.sha256)  # noqa: E731 - one line, used once
    for answer in study.exchange.ask("train", list(site_of), instruction, decode):
        site = study.facts.sites[site_of[answer.node]]
        code = _accept(study, answer, site, number, mean, weights[site.name], upload)
        if code:
            failed[site.name] = code
            site.note_failure(code)
            study.progress.site_failed(site.name, code)
        else:
            site.rounds += 1
            study.progress.site_done(site.name)
    return mean, failed


def _accept(  # noqa: PLR0913, PLR0917 - the parts of one decision
    study: Study,
    answer: Answer[Update],
    site: SiteFacts,
    number: int,
    mean: StreamingMean,
    weight: float,
    upload: AdapterLayout,
) -> str:
    """Validate one update and add it to the mean; return an empty string, or the code of its refusal."""
    update = answer.reply
    if update is None:
        return answer.code
    try:
        if update.site != site.name or update.round != number:
            raise MessageError("wrong-sender", "the update names another site or round")
        known = study.plan.training.local_steps * (site.rounds + 1), site.evaluations
        check_events(study.plan, update.events, at_least=known)
        validate(update.state, upload, max_norm=study.plan.aggregation.max_update_norm, reference=study.adapter)
        mean.add(update.state, weight)
    except FedtuneError as error:
        return error.code
    site.events = update.events
    return ""


def check_events(plan: StudyPlan, events: Iterable[Event], *, at_least: tuple[int, int] = (0, 0)) -> None:
    """Refuse events that a site of this plan cannot have spent, because ε is computed from what it says.

    Every event must be of one of the plan's mechanisms, training or noisy evaluation. `at_least` are the steps of the
    rounds whose updates were accepted, and the evaluations that were; the upper bounds leave room for rounds that were
    repeated and keep the accountant's work finite.
    """
    promise = plan.promise
    if promise.mode == "off":
        return
    said = [(replace(event, steps=0), event.steps) for event in events]
    mechanisms = promise.event(0), promise.evaluation_event(0)
    if any(mechanism not in mechanisms for mechanism, _ in said):
        raise MessageError("wrong-events", "the site's privacy events are not of the plan's mechanisms")
    planned = promise.max_steps, promise.evaluations
    for mechanism, most, known in zip(mechanisms, planned, at_least, strict=True):
        spent = sum(steps for found, steps in said if found == mechanism)
        if not known <= spent <= _MOST_REPEATS * most:
            raise MessageError("wrong-events", f"the site's privacy events add up to {spent} steps, {known} are known")


def _require_quorum(plan: StudyPlan, asked: list[str], failed: dict[str, str], number: int) -> None:
    needed = max(1, math.ceil(plan.federation.quorum * len(asked)))
    if len(asked) - len(failed) >= needed:
        return
    causes = ", ".join(f"{name}: {code}" for name, code in sorted(failed.items())[:5])
    raise FederationError(
        "no-quorum",
        f"round {number}: {len(asked) - len(failed)} of {len(asked)} sites answered, {needed} are needed ({causes})",
        hint="mend the sites and continue with fedtune simulate --resume RUN, or lower federation.quorum in a new run",
    )


def _measure(study: Study, number: int) -> dict[str, float] | None:
    if not study.plan.evaluation.measures(number, study.plan.federation.rounds):
        return None
    metrics = study.evaluator.measure(study.facts, study.nodes, number, study.released)
    study.facts.final = metrics
    return metrics


def _save(study: Study) -> None:
    state = Checkpoint(study.round, study.adapter, study.optimizer, study.average.state(), study.facts.to_dict())
    save_checkpoint(study.folder.checkpoints, study.plan.sha256, state)


def _result(
    study: Study,
    asked: list[str],
    failed: dict[str, str],
    before: tuple[int, int],
    metrics: dict[str, float] | None,
    seconds: float,
) -> RoundInfo:
    spent = study.facts.max_epsilon(study.plan.promise)
    up, down = study.exchange.traffic.up - before[0], study.exchange.traffic.down - before[1]
    shown = None if metrics is None else metrics.get(study.evaluator.headline)
    return RoundInfo(study.round, len(asked), len(asked) - len(failed), dict(failed), spent, shown, seconds, up, down)


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
