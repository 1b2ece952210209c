"""A site that trains nothing: it returns the adapter it was sent, moved by a constant, as a valid update of its plan.

What is left when every site answers like this is the cost of the simulation itself: messages, checks, mean, server
step, checkpoint. Module-level, so that Ray's workers find it by name.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.flower.messages import Description, Update, decode_instruction, encode_reply
from fedtune.journal.chain import public_hex
from fedtune.journal.witness import HEAD, Head

app = ClientApp()
_STEP = np.float32(1e-3)


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Answer with a name and a count."""
    plan = _plan(str(context.run_config[PLAN_KEY]))
    receipt = decode_instruction(message.content, plan.sha256).receipt
    head = _head(_name(context), 0 if receipt is None else receipt.head.sequence)
    return Message(encode_reply(Description(plan.sha256, _name(context), 100, "0" * 64, (), head)), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with the adapter moved by a constant, and the events that so many rounds cost."""
    plan = _plan(str(context.run_config[PLAN_KEY]))
    instruction = decode_instruction(message.content, plan.sha256)
    frozen = () if plan.aggregation.algorithm == "fedit" else (".lora_A.weight",)
    state = {name: array + _STEP for name, array in instruction.adapter.items() if not name.endswith(frozen or "/")}
    events = (plan.promise.event(instruction.round * plan.training.local_steps),) if plan.promise.mode == "dp" else ()
    update = Update(
        plan.sha256, _name(context), instruction.round, state, events, _head(_name(context), instruction.round)
    )
    return Message(encode_reply(update), reply_to=message)


@lru_cache(maxsize=1)
def _plan(text: str) -> StudyPlan:
    return StudyPlan.from_json(text)


def _head(name: str, sequence: int) -> Head:
    """Sign the head of a journal that exists in name only, so that a site needs no file."""
    signer = _signer(name)
    stands = {"site": _hash(name), "sequence": sequence, "digest": _hash(f"{name} {sequence}")}
    return Head(**stands, public_key=public_hex(signer), signature=signer.sign(HEAD + rfc8785.dumps(stands)).hex())


@lru_cache(maxsize=10_000)
def _signer(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _name(context: Context) -> str:
    return f"site-{context.node_config['partition-id']:0>6}"
