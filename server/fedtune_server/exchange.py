"""Sends one round's messages over Flower and yields each site's reply as it comes, or the code of its failure.

Each message takes its site's newest receipt along, and the head in each reply is witnessed here, so that no caller can
forget it. Knows nodes, deadlines and bytes; what else a reply means is for the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.errors import FedtuneError
from fedtune.flower.engine import engine_died
from fedtune.flower.messages import Instruction, Refusal, content_bytes, encode_instruction, with_receipt
from fedtune.journal.witness import Head, Receipt
from fedtune_server.witness import Witness

_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 60.0


class Headed(Protocol):
    """A decoded reply with the signed head of its site's journal."""

    @property
    def head(self) -> Head:
        """Where the journal stands."""


Reply = TypeVar("Reply", bound=Headed)


@dataclass(frozen=True, slots=True)
class Answer(Generic[Reply]):
    """One node's outcome: a decoded reply, or None with the code of what went wrong; bytes that came up."""

    node: int
    reply: Reply | None
    code: str
    bytes_up: int


@dataclass(slots=True)
class Traffic:
    """Payload bytes of a study so far."""

    up: int = 0
    down: int = 0


class Exchange:
    """Asks nodes and collects their answers within the plan's deadline.

    `sites` names the nodes that have introduced themselves; only these get receipts and have their heads countersigned.
    """

    def __init__(self, grid: Grid, deadline: float, traffic: Traffic, witness: Witness) -> None:
        self._grid = grid
        self._deadline = deadline
        self.traffic = traffic
        self.witness = witness
        self.sites: dict[int, str] = {}

    def nodes(self, expected: int) -> list[int]:
        """Return the connected nodes; wait for `expected` of them for a while, since an engine adds them one by one."""
        until = time.monotonic() + min(self._deadline, _PATIENCE_SECONDS)
        while len(nodes := sorted(self._grid.get_node_ids())) < expected and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        return nodes

    def ask(
        self,
        kind: str,
        nodes: Sequence[int],
        instruction: Instruction,
        decode: Callable[[Message], Reply | Refusal],
    ) -> Iterator[Answer[Reply]]:
        """Send one instruction to each node and yield one answer a node, in the order of arrival.

        The instruction is encoded once, only the receipts differ. A node that has not answered when the deadline passes
        yields `federation.deadline`; its later reply is never looked at.
        """
        shared = encode_instruction(instruction)
        group = str(instruction.round)
        contents = [with_receipt(shared, self._receipt(node)) for node in nodes]
        messages = [
            self._grid.create_message(content, kind, node, group, ttl=self._deadline)
            for node, content in zip(nodes, contents, strict=True)
        ]
        until = time.monotonic() + self._deadline
        pending = dict(zip(self._grid.push_messages(messages), nodes, strict=True))
        self.traffic.down += sum(content_bytes(content) for content in contents)
        yield from self._collect(pending, until, decode)

    def _receipt(self, node: int) -> Receipt | None:
        name = self.sites.get(node)
        return None if name is None else self.witness.newest(name)

    def _collect(
        self, pending: dict[str, int], until: float, decode: Callable[[Message], Reply | Refusal]
    ) -> Iterator[Answer[Reply]]:
        while pending and time.monotonic() < until and not engine_died.is_set():
            messages = list(self._grid.pull_messages(pending))
            for message in messages:
                node = pending.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield self._answer(node, message, decode)
            if not messages:
                time.sleep(_POLL_SECONDS)
        for node in pending.values():
            yield Answer(node, None, "federation.deadline", 0)

    def _answer(self, node: int, message: Message, decode: Callable[[Message], Reply | Refusal]) -> Answer[Reply]:
        if message.has_error():
            return Answer(node, None, f"flower.error-{message.error.code}", 0)
        size = content_bytes(message.content) if "fedtune" in message.content else 0
        self.traffic.up += size
        try:
            reply = decode(message)
            if isinstance(reply, Refusal):
                return Answer(node, None, reply.code, size)
            if node in self.sites:
                self.witness.accept(self.sites[node], reply.head)
        except FedtuneError as error:
            return Answer(node, None, error.code, size)
        return Answer(node, reply, "", size)
