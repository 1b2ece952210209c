"""The site's Flower app: Record → Example → Batch → ClippedSum → NoisyGradient → adapter → Update.

It runs the plan it was given and nothing else. Whatever goes wrong leaves the site as a code, never as text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.aggregation.algorithms import Algorithm, get_algorithm
from fedtune.aggregation.validation import validate
from fedtune.errors import MessageError, PrivacyError
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
from fedtune.training.evaluate import evaluate
from fedtune.training.local import Assignment, event_of_round, train_round
from fedtune_client.site import Site, open_site

app = ClientApp()
logger = logging.getLogger("fedtune.site")

Answer = Description | Update | Evaluation | Refusal


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
    try:
        site = open_site(context)
        reply = act(site, decode_instruction(message.content, site.plan.sha256))
    except Exception as error:
        logger.debug("the site refuses a message", exc_info=True)
        reply = refusal_of(error)
    return Message(encode_reply(reply), reply_to=message)


def _describe(site: Site, _instruction: Instruction) -> Answer:
    return Description(site.plan.sha256, site.data.name, site.units, site.data.data_sha256, site.spending.spent())


def _train(site: Site, instruction: Instruction) -> Answer:
    plan, number = site.plan, instruction.round
    if not 1 <= number <= plan.federation.rounds:
        raise MessageError("wrong-round", f"round {number} is not one of the plan's {plan.federation.rounds}")
    algorithm = _checked(site, instruction)
    reserved = site.spending.reserve(number, event_of_round(plan)).event
    assignment = Assignment(site.data.name, number, instruction.adapter, reserved, site.memory.before(number))
    layouts = algorithm.trained(site.workspace.layout), algorithm.upload(site.workspace.layout)
    result = train_round(plan, site.workspace, site.data.train, assignment, layouts, site.data.units)
    site.memory.keep(number, result.optimizer_state)
    return Update(plan.sha256, site.data.name, number, result.state, site.spending.spent())


def _evaluate(site: Site, instruction: Instruction) -> Answer:
    if site.plan.evaluation.site_metrics == "off":
        raise PrivacyError("metrics-off", "the plan keeps held-out metrics at the site")
    _checked(site, instruction)
    size = site.plan.evaluation.batch_size
    tally = evaluate(site.workspace, instruction.adapter, site.data.held_out, size)
    return Evaluation(site.plan.sha256, site.data.name, instruction.round, tally.to_arrays())


def _checked(site: Site, instruction: Instruction) -> Algorithm:
    """Refuse an adapter that is not exactly what the plan's algorithm sends down; a frozen A is never taken from it."""
    algorithm = get_algorithm(site.plan.aggregation.algorithm)
    layout = algorithm.download(site.workspace.layout)
    validate(instruction.adapter, layout, max_norm=math.inf, reference=site.workspace.initial)
    return algorithm
