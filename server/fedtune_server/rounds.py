"""A study, round by round: … (Flower message) → validate → Collector → algorithm → Adapter → Scorecard.

One bad or silent site never ends a round: its reply is refused, named and counted, and the round goes on while a quorum
answers. A site whose replies are such as no honest site sends is quarantined. After each round everything that a
resumed study needs is in one checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace

from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.protocol import ServerState, Turn
from fedtune.aggregation.weights import site_weights
from fedtune.config.plan import StudyPlan
from fedtune.errors import FederationError, FedtuneError
from fedtune.flower.messages import Update, decode_update
from fedtune.run.folder import RunFolder
from fedtune.simulation.progress import RoundInfo
from fedtune_server.exchange import Answer
from fedtune_server.merging import Sending
from fedtune_server.replies import read_update
from fedtune_server.roll_call import welcome
from fedtune_server.selection import sites_of_round
from fedtune_server.study import Study

logger = logging.getLogger("fedtune.coordinator")


@dataclass(slots=True)
class _Round:
    """One round as it goes: who was selected and who is asked, whose updates were taken, the codes of the rest.

    `merging` is the seconds of the coordinator's own work: messages made, replies checked and added, and their result.
    """

    number: int
    selected: int
    asked: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    taken: dict[str, Update] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)
    merging: float = 0.0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Count the time of the block as the coordinator's own work."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.merging += time.monotonic() - started


@dataclass(frozen=True, slots=True)
class _Part:
    """One exchange of a round: its messages, what takes the replies, and how many end it."""

    sending: Sending
    collector: Collector
    weights: dict[str, float]
    wanted: float


def run_rounds(study: Study) -> None:
    """Run every round that is left."""
    study.assign_ranks()
    if study.round == 0:
        study.facts.initial = study.evaluator.measure(study.facts, study.nodes, 0, study.state, initial=True)
    for number in range(study.round + 1, study.plan.federation.rounds + 1):
        welcome(study)
        _run_round(study, number)


def _run_round(study: Study, number: int) -> None:
    started = time.monotonic()
    current = _begin(study, number)
    study.progress.round_started(number, len(current.asked))
    before = (study.exchange.traffic.up, study.exchange.traffic.down)
    study.state = _merged(study, current)
    _note_taken(study, current)
    study.average.push(study.state.adapter)
    study.round = number
    metrics = _measure(study, number)
    seconds = time.monotonic() - started
    study.facts.seconds += seconds
    study.facts.bytes_up, study.facts.bytes_down = study.exchange.traffic.up, study.exchange.traffic.down
    result = _result(study, current, before, metrics, seconds)
    study.exchange.witness.save()
    # before the checkpoint: a line without one is dropped on resume
    _log(study.folder, result, metrics, current.merging)
    study.save()
    study.progress.round_done(result)


def _begin(study: Study, number: int) -> _Round:
    """Select the round's sites. One that rests is not selected, one in quarantine counts as missing."""
    resting = {name for name, site in study.facts.sites.items() if number <= site.rests_until}
    selected = [name for name in sites_of_round(study.plan, study.names, number) if name not in resting]
    current = _Round(number, len(selected))
    for name in selected:
        site = study.facts.sites.get(name)
        if site is not None and site.quarantine:
            continue
        if site is not None and name in study.nodes:
            current.asked.append(name)
        else:
            _fail(study, current, name, study.facts.refused.get(name, "federation.offline"))
    return current


def _merged(study: Study, current: _Round) -> ServerState:
    """Return the state after all exchanges of a round.

    A later exchange is about what all sites of the first one sent: where one has left in between, the others are asked
    from the start again, and answer the first with the same bytes.
    """
    exchanges, asked = study.merging.algorithm.traits.exchanges, current.asked
    while True:
        state, present = study.state, asked
        for part in range(exchanges):
            state, present = _exchange(study, current, Turn(current.number, part), state, present)
            if part == 0:
                asked = present
        if present == asked:
            return state
        asked = present


def _exchange(
    study: Study, current: _Round, turn: Turn, state: ServerState, asked: list[str]
) -> tuple[ServerState, list[str]]:
    """Ask sites and take each valid reply as it comes; return the next state and who has answered."""
    sending = study.merging.exchange(turn, state)
    wanted = _enough(study, current)
    weights = site_weights(study.plan.aggregation, study.names)
    collector = study.merging.collector(turn, study.folder.path)
    current.taken = {}
    with closing(collector):
        _collect(study, current, _Part(sending, collector, weights, wanted), asked)
        _require_quorum(study.plan, current)
        with current.at_work():
            return study.merging.finish(turn, state, collector.result()), sorted(current.taken)


def _enough(study: Study, current: _Round) -> float:
    """Return how many replies end an exchange early; one that others follow waits for all."""
    share = study.plan.federation.early_close
    if share is None or study.merging.algorithm.traits.exchanges > 1:
        return math.inf
    return math.ceil(share * current.selected)


def _collect(study: Study, current: _Round, part: _Part, asked: list[str]) -> None:
    """Take updates as they come, until all have answered, enough have, or the time is over."""
    site_of = {study.nodes[name]: name for name in asked}
    sites = study.facts.sites
    with current.at_work():
        instructions = {node: part.sending.instruction(sites[name], current.number) for node, name in site_of.items()}
    current.marks = {name: instructions[node].standing.mark for node, name in site_of.items()}
    answers = study.exchange.ask(
        "train",
        list(site_of),
        instructions,
        lambda content: decode_update(content, study.plan.sha256),
        enough=lambda: len(current.taken) >= part.wanted,
    )
    for answer in answers:
        _take(study, current, part, site_of[answer.node], answer)


def _take(study: Study, current: _Round, part: _Part, name: str, answer: Answer[Update]) -> None:
    """Take one update, or note why it does not count."""
    site, update = study.facts.sites[name], answer.reply
    if update is None:
        _fail(study, current, name, answer.code, offence=answer.offence)
        return
    try:
        with current.at_work():
            state = read_update(study.plan, update, site, part.sending, site.rank)
            part.collector.add(name, state, part.weights[name])
    except FedtuneError as error:
        _fail(study, current, name, error.code, offence=True)
        return
    current.taken[name] = replace(update, state={})
    is_last = part.sending.turn.part == study.merging.algorithm.traits.exchanges - 1
    if is_last and name not in current.shown:  # exchanges that are made again would count a site twice
        current.shown.add(name)
        study.progress.site_done(name)


def _note_taken(study: Study, current: _Round) -> None:
    """Note what each site whose update is in the new adapter has spent and keeps."""
    for name, update in current.taken.items():
        site = study.facts.sites[name]
        site.events = update.events
        site.rounds += 1
        site.counted = current.number
        site.note_held(current.number - 1, current.marks[name])


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
    if len(current.taken) >= needed:
        return
    causes = ", ".join(f"{name}: {code}" for name, code in sorted(current.failed.items())[:5])
    raise FederationError(
        "no-quorum",
        f"round {current.number}: {len(current.taken)} of {current.selected} sites answered, {needed} are needed "
        f"({causes})",
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
    return RoundInfo(current.number, current.selected, len(current.taken), failed, spent, shown, seconds, up, down)


def _log(folder: RunFolder, result: RoundInfo, metrics: dict[str, float] | None, merging: float) -> None:
    folder.log_metrics(
        {
            "round": result.number,
            "asked": result.asked,
            "failed": dict(result.failed),
            "epsilon": result.epsilon_spent,
            "metrics": metrics,
            "seconds": round(result.seconds, 6),
            "merging_seconds": round(merging, 6),
            "bytes_up": result.bytes_up,
            "bytes_down": result.bytes_down,
        }
    )
