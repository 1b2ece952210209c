"""The site's Flower app: Record → Example → Batch → ClippedSum → NoisyGradient → adapter → Update.

It runs the plan it was given and nothing else. Whatever goes wrong leaves the site as a code, never as text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedtune.aggregation.lora.protocol import SiteState, Turn
from fedtune.errors import MessageError
from fedtune.evaluation.site_metrics import event_of_evaluation, refuse_unplanned
from fedtune.flower.messages import (
    Description,
    Evaluation,
    Instruction,
    Refusal,
    Update,
    decode_instruction,
    encode_reply,
    refusal_of,
)
from fedtune.journal.ledger import Commitment, Reservation
from fedtune.privacy.accounting import Event
from fedtune.simulation.sites import SiteData
from fedtune.training.evaluate import HeldOut, measure
from fedtune.training.local import Assignment, LocalResult, event_of_round, train_round
from fedtune_client.authority import Round
from fedtune_client.channel import answered
from fedtune_client.personal import keep_personal
from fedtune_client.site import Site, open_resident, open_site, plan_of, study_of
from fedtune_client.updates import Payload, as_bytes, digest_of
from fedtune_client.updating import Exchange, after_training, received, to_keep, to_send

app = ClientApp()
logger = logging.getLogger("fedtune.site")

# what a round of several exchanges keeps
_PART, _START, _PAYLOAD, _RECEIVED = "part/", "part-start", "part-payload", "part-received/"
Answer = Description | Update | Evaluation | Refusal


@dataclass(frozen=True, slots=True)
class _Claim:
    """A round that is charged, and the records that were read for it: the same until it ends."""

    reservation: Reservation
    data: SiteData


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Answer who this site is and what it has spent."""
    return _answer(message, context, _describe)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with an update after one round of local steps."""
    return _answer(message, context, _train)


@app.evaluate()
def evaluate_adapter(message: Message, context: Context) -> Message:
    """Answer with the tally of an adapter on the site's held-out records."""
    return _answer(message, context, _evaluate)


def _answer(message: Message, context: Context, act: Callable[[Site, Instruction], Answer]) -> Message:
    """Answer in the way that the message came: at a real site from one signed envelope into another."""
    act_on = partial(_act, message.metadata.message_type, context, act)
    return answered(message, study_of(context), lambda: open_resident().site, act_on)


def _act(kind: str, context: Context, act: Callable[[Site, Instruction], Answer], content: RecordDict) -> RecordDict:
    try:
        plan = plan_of(context)
        instruction = decode_instruction(content, plan.sha256)
        reply = act(open_site(context, plan, instruction.receipt), instruction)
        logger.info("answered: %s", kind, extra={"study": plan.sha256[:16], "round": instruction.round})
    except Exception as error:
        reply = refusal_of(error)
        logger.info("refused: %s", kind, extra={"study": study_of(context)[:16], "code": reply.code})
        logger.debug("its cause", exc_info=True)
    return encode_reply(reply)


def _describe(site: Site, _instruction: Instruction) -> Answer:
    units, data = site.units, site.data.data_sha256
    spent = site.authority.spent(site.plan).events
    return Description(site.plan.sha256, site.name, units, data, spent, site.authority.head(), site.most_rank)


def _train(site: Site, instruction: Instruction) -> Answer:
    plan, number = site.plan, instruction.round
    if not 1 <= number <= plan.federation.rounds:
        raise MessageError("wrong-round", f"round {number} is not one of the plan's {plan.federation.rounds}")
    exchange = received(site, instruction, number)
    if instruction.standing.part:
        return _later_part(site, exchange)
    earlier = site.memory.before(number)
    asked = Round(plan, number, "training", digest_of({**exchange.inputs(), **earlier}), event_of_round(plan))
    claim = _claim(site, asked)
    if isinstance(claim, Commitment):
        return _update(site, exchange.turn, claim, site.authority.stored(claim))
    assignment = Assignment(site.name, number, exchange.start, claim.reservation, earlier, exchange.variates)
    layouts = exchange.trained, exchange.trained
    result = train_round(plan, exchange.workspace, claim.data.train, assignment, layouts, claim.data.units)
    site.memory.keep(number, result.optimizer_state)
    payload = _payload(site, exchange, asked, result, site.authority.spent_by(claim.reservation).events)
    return _update(site, exchange.turn, site.authority.commit(claim.reservation, payload), payload)


def _payload(site: Site, exchange: Exchange, asked: Round, result: LocalResult, events: tuple[Event, ...]) -> bytes:
    """Return the bytes that are committed; what the site keeps for itself is on disk before they are."""
    trained = after_training(exchange, result)
    message, residuals = to_send(site, exchange, trained)
    kept = to_keep(exchange, trained, result, residuals)
    if exchange.algorithm.traits.exchanges == 1:
        payload = Payload(message, events).to_bytes()
    else:  # what later parts are made of is committed with the first one, and stays here
        payload = Payload(
            {**message, **{_PART + name: trained.adapter[name] for name in trained.adapter}}, events
        ).to_bytes()
        kept |= {_START: as_bytes(asked.start.encode()), _PAYLOAD: as_bytes(payload)}
        kept |= {_RECEIVED + name: array for name, array in exchange.sent_later.items()}
    site.kept.keep(exchange.turn.number, exchange.counted, kept)
    return payload


def _later_part(site: Site, exchange: Exchange) -> Answer:
    """Answer a later exchange of a round from what its training has committed; nothing is trained or charged again."""
    held = site.kept.at(exchange.turn.number)
    if _PAYLOAD not in held:
        raise MessageError("wrong-round", f"round {exchange.turn.number} has no first part here")
    start, payload = held[_START].tobytes().decode(), held[_PAYLOAD].tobytes()
    asked = Round(site.plan, exchange.turn.number, "training", start, event_of_round(site.plan))
    commitment = site.authority.made(asked)
    if commitment is None:
        raise MessageError("wrong-round", f"round {exchange.turn.number} was not committed here")
    committed = Payload.from_bytes(site.authority.send(commitment, payload))
    trained, turn = _under(_PART, committed.arrays), exchange.turn
    message, _ = to_send(site, exchange.on_top_of(_under(_RECEIVED, held)), SiteState(trained, exchange.state.memory))
    return Update(site.plan.sha256, site.name, turn.number, message, committed.events, site.authority.head(), turn.part)


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _evaluate(site: Site, instruction: Instruction) -> Answer:
    plan, number = site.plan, instruction.round
    refuse_unplanned(plan, number)
    exchange = received(site, instruction, number + 1)
    if not exchange.algorithm.traits.releases:
        keep_personal(site.authority.vault, plan, exchange.start)
    cost, claim = event_of_evaluation(plan), None
    if cost is not None:
        claim = _claim(site, Round(plan, number, "metrics", digest_of(exchange.start), cost))
    if isinstance(claim, Commitment):
        return _evaluation(site, number, claim, site.authority.stored(claim))
    data, reservation = (site.data, None) if claim is None else (claim.data, claim.reservation)
    held_out = HeldOut(site.name, data.held_out, data.held_out_units)
    measured = measure(plan, exchange.workspace, held_out, number, exchange.start, reservation).to_arrays()
    if reservation is None:
        return Evaluation(plan.sha256, site.name, number, measured, site.authority.head())
    payload = Payload(measured, ()).to_bytes()
    return _evaluation(site, number, site.authority.commit(reservation, payload), payload)


def _claim(site: Site, asked: Round) -> _Claim | Commitment:
    """Charge a round: caps first; then records are read, because a grant is for what they are; then RESERVE."""
    known = site.authority.earlier(asked)
    if known is not None:
        return known
    site.authority.check(asked)
    data = site.load()
    return _Claim(site.authority.reserve(asked, data.data_sha256), data)


def _update(site: Site, turn: Turn, commitment: Commitment, payload: bytes) -> Update:
    """Return the message that carries a committed update: the same for every time that it is asked for."""
    held = Payload.from_bytes(site.authority.send(commitment, payload))
    sent = {name: array for name, array in held.arrays.items() if not name.startswith(_PART)}
    return Update(site.plan.sha256, site.name, turn.number, sent, held.events, site.authority.head())


def _evaluation(site: Site, number: int, commitment: Commitment, payload: bytes) -> Evaluation:
    """Return the message that carries committed metrics."""
    held = Payload.from_bytes(site.authority.send(commitment, payload))
    return Evaluation(site.plan.sha256, site.name, number, held.arrays, site.authority.head())
