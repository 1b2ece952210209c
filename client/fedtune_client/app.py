"""The site's Flower app: Record → Example → Batch → ClippedSum → NoisyGradient → adapter → Update.

It runs the plan it was given and nothing else. Whatever goes wrong leaves the site as a code, never as text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.aggregation.algorithms import Algorithm, get_algorithm
from fedtune.aggregation.validation import validate
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
from fedtune.simulation.sites import SiteData
from fedtune.training.evaluate import HeldOut, measure
from fedtune.training.local import Assignment, event_of_round, train_round
from fedtune_client.authority import Round
from fedtune_client.channel import answered
from fedtune_client.site import Site, open_resident, open_site, plan_of, study_of
from fedtune_client.updates import Payload, digest_of

app = ClientApp()
logger = logging.getLogger("fedtune.site")

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
    return Description(site.plan.sha256, site.name, units, data, spent, site.authority.head())


def _train(site: Site, instruction: Instruction) -> Answer:
    plan, number = site.plan, instruction.round
    if not 1 <= number <= plan.federation.rounds:
        raise MessageError("wrong-round", f"round {number} is not one of the plan's {plan.federation.rounds}")
    algorithm = _checked(site, instruction)
    earlier = site.memory.before(number)
    start = digest_of({**instruction.adapter, **earlier})
    claim = _claim(site, Round(plan, number, "training", start, event_of_round(plan)))
    if isinstance(claim, Commitment):
        return _update(site, number, claim, site.authority.stored(claim))
    assignment = Assignment(site.name, number, instruction.adapter, claim.reservation, earlier)
    layouts = algorithm.trained(site.workspace.layout), algorithm.upload(site.workspace.layout)
    result = train_round(plan, site.workspace, claim.data.train, assignment, layouts, claim.data.units)
    site.memory.keep(number, result.optimizer_state)
    payload = Payload(result.state, site.authority.spent_by(claim.reservation).events).to_bytes()
    return _update(site, number, site.authority.commit(claim.reservation, payload), payload)


def _evaluate(site: Site, instruction: Instruction) -> Answer:
    plan, number = site.plan, instruction.round
    refuse_unplanned(plan, number)
    _checked(site, instruction)
    cost, claim = event_of_evaluation(plan), None
    if cost is not None:
        claim = _claim(site, Round(plan, number, "metrics", digest_of(instruction.adapter), cost))
    if isinstance(claim, Commitment):
        return _evaluation(site, number, claim, site.authority.stored(claim))
    data, reservation = (site.data, None) if claim is None else (claim.data, claim.reservation)
    held_out = HeldOut(site.name, data.held_out, data.held_out_units)
    measured = measure(plan, site.workspace, held_out, number, instruction.adapter, reservation).to_arrays()
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


def _update(site: Site, number: int, commitment: Commitment, payload: bytes) -> Update:
    """Return the message that carries a committed update: the same for every time that it is asked for."""
    held = Payload.from_bytes(site.authority.send(commitment, payload))
    return Update(site.plan.sha256, site.name, number, held.arrays, held.events, site.authority.head())


def _evaluation(site: Site, number: int, commitment: Commitment, payload: bytes) -> Evaluation:
    """Return the message that carries committed metrics."""
    held = Payload.from_bytes(site.authority.send(commitment, payload))
    return Evaluation(site.plan.sha256, site.name, number, held.arrays, site.authority.head())


def _checked(site: Site, instruction: Instruction) -> Algorithm:
    """Refuse an adapter that is not exactly what the plan's algorithm sends down; a frozen A is never taken from it."""
    algorithm = get_algorithm(site.plan.aggregation.algorithm)
    layout = algorithm.download(site.workspace.layout)
    validate(instruction.adapter, layout, max_norm=math.inf, reference=site.workspace.initial)
    return algorithm
