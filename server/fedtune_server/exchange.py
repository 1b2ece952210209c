"""Sends one round's messages over Flower and yields each site's reply as it comes, or the code of its failure.

Each message takes its site's newest receipt along, and the head in each reply is witnessed here, so that no caller can
forget it. Between machines it is signed, and a site that was lost on the way is asked again until the round is over: it
answers what it has answered before with the same bytes. Knows nodes, deadlines and bytes; what else a reply means is
for the caller.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import EnvelopeError, FedtuneError
from fedtune.flower.engine import engine_died
from fedtune.flower.failures import LOST, code_of
from fedtune.flower.messages import (
    Instruction,
    Refusal,
    content_bytes,
    encode_instruction,
    encode_instructions,
    unsigned_code,
    with_receipt,
)
from fedtune.journal.witness import Head, Receipt
from fedtune_server.fleet import Fleet
from fedtune_server.outstanding import Outstanding
from fedtune_server.witness import Witness

_POLL_SECONDS = 0.02
_SHORTEST_PAUSE, _LONGEST_PAUSE, _SHARE = 0.1, 1.0, 0.05  # between machines: a look costs its SuperLink 10 ms
_PATIENCE_SECONDS = 60.0
_SIGNED = "envelope.contradiction"  # what only the site itself can have put there: its body belies its own header
logger = logging.getLogger("fedtune.coordinator")


class Headed(Protocol):
    """A decoded reply with the signed head of its site's journal."""

    @property
    def head(self) -> Head:
        """Where the journal stands."""


Reply = TypeVar("Reply", bound=Headed)
Decode = Callable[[RecordDict], Reply | Refusal]


@dataclass(frozen=True, slots=True)
class Answer(Generic[Reply]):
    """One node's outcome: a decoded reply, or None with the code of what went wrong; bytes that came up.

    `offence` says that the reply was the site's own and such as no honest site sends.
    """

    node: int
    reply: Reply | None
    code: str
    bytes_up: int = 0
    offence: bool = False


@dataclass(slots=True)
class Traffic:
    """Payload bytes of a study so far."""

    up: int = 0
    down: int = 0


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked, encoded once; arrays are shared where sites are asked the same. Times are of the steady clock."""

    kind: str
    round: int
    contents: Mapping[int, RecordDict]
    began: float
    until: float

    @property
    def pause(self) -> float:
        """Seconds until the next look for replies: a share of the time that the question has taken so far."""
        return min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, _SHARE * (time.monotonic() - self.began)))

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.001, self.until - time.monotonic())


class Exchange:
    """Asks nodes and collects their answers within the plan's deadline.

    `sites` names the nodes that have introduced themselves; only these get receipts and have their heads countersigned.
    `fleet` is None in a simulation.
    """

    def __init__(
        self,
        grid: Grid,
        deadline: float,
        traffic: Traffic,
        witness: Witness,
        fleet: Fleet | None = None,
        reconnect: float = 0.0,
    ) -> None:
        self._grid = grid
        self._deadline = deadline
        self._reconnect = reconnect if fleet is not None else 0.0
        self._late: dict[str, tuple[int, int]] = {}
        self.fleet = fleet
        self.traffic = traffic
        self.witness = witness
        self.sites: dict[int, str] = {}

    def nodes(self, expected: int) -> list[int]:
        """Return the connected nodes; wait for `expected` of them for a while, since they come one by one."""
        until = time.monotonic() + min(self._deadline, _PATIENCE_SECONDS)
        while len(nodes := self.online()) < expected and time.monotonic() < until:
            time.sleep(_POLL_SECONDS if self.fleet is None else _LONGEST_PAUSE / 2)
        return nodes

    def name(self, node: int) -> str:
        """Return the site of a node, as it is enrolled or as it has introduced itself, or nothing."""
        return self.sites.get(node, "") if self.fleet is None else self.fleet.nodes().get(node, "")

    def online(self) -> list[int]:
        """Return the nodes of the study that are connected now."""
        connected = set(self._grid.get_node_ids())
        return sorted(connected if self.fleet is None else connected & self.fleet.nodes().keys())

    def ask(
        self,
        kind: str,
        nodes: Sequence[int],
        instruction: Instruction | Mapping[int, Instruction],
        decode: Decode[Reply],
        *,
        enough: Callable[[], bool] = lambda: False,
        within: float = math.inf,
    ) -> Iterator[Answer[Reply]]:
        """Send an instruction to each node, one for all or its own, and yield one answer a node as they arrive.

        A node that has not answered when the deadline passes yields `federation.deadline`, and `federation.closed` when
        the caller has `enough`; its later reply is never looked at. `within` are seconds that shorten the deadline.
        """
        began = time.monotonic()
        until = began + min(self._deadline, within)
        question = _question(kind, nodes, instruction, began, until)
        waiting = Outstanding(self._reconnect)
        yield from self._send(question, nodes, waiting)
        while waiting and time.monotonic() < until and not enough() and not engine_died.is_set():
            messages = self._pull(waiting.messages)
            for message in messages:
                node = waiting.answered(message.metadata.reply_to_message_id)
                if node is not None:
                    yield from self._taken(node, message, decode, waiting)
            if not messages:
                time.sleep(_POLL_SECONDS if self.fleet is None else question.pause)
            if self.fleet is not None:
                yield from self._ask_again(question, waiting)
        self._late |= {message: (node, question.round) for message, node in waiting.messages.items()}
        code = "federation.closed" if enough() else "federation.deadline"
        for node in waiting.nodes:
            yield Answer(node, None, code)

    def _send(self, question: _Question, nodes: Sequence[int], waiting: Outstanding) -> Iterator[Answer[Reply]]:
        """Send a question to nodes; one that no message can go to is lost, or refused."""
        away: set[int] = set()
        contents = {node: with_receipt(question.contents[node], self._receipt(node)) for node in nodes}
        if self.fleet is not None:
            away = contents.keys() - set(self.online())
            known = self.fleet.nodes()
            for node in away - known.keys():
                waiting.done(node)
                yield Answer(node, None, "envelope.revoked")
            away &= known.keys()
            present = {node: content for node, content in contents.items() if node in known and node not in away}
            contents = self.fleet.seal(question.kind, question.round, present, question.left)
        sent = self._push(question, contents)
        waiting.asked((message, node) for node, message in sent.items())
        for node in away | (contents.keys() - sent.keys()):
            yield from self._missed(node, "federation.offline", waiting)

    def _push(self, question: _Question, contents: Mapping[int, RecordDict]) -> dict[int, str]:
        """Hand messages to Flower and return their ids by node; it takes none for a node that is unknown to it."""
        group = str(question.round)
        messages = [
            self._grid.create_message(content, question.kind, node, group, ttl=question.left)
            for node, content in contents.items()
        ]
        sent = dict(zip(contents, self._grid.push_messages(messages), strict=False)) if messages else {}
        taken = {node: message for node, message in sent.items() if message}
        self.traffic.down += sum(content_bytes(contents[node]) for node in taken)
        return taken

    def _pull(self, wanted: Iterable[str]) -> list[Message]:
        """Return what has come of the messages wanted, after saying what has come too late for earlier rounds."""
        if not self._late or self.fleet is None:
            return list(self._grid.pull_messages(wanted))
        found = list(self._grid.pull_messages([*wanted, *self._late]))
        for message in found:
            node, number = self._late.pop(message.metadata.reply_to_message_id, (None, 0))
            if node is not None and not message.has_error():
                site = self.name(node) or f"node {node}"
                logger.warning("dropped the reply of %s to round %d: it came too late", site, number)
        return found

    def _receipt(self, node: int) -> Receipt | None:
        name = self.sites.get(node)
        return None if name is None else self.witness.newest(name)

    def _taken(
        self, node: int, message: Message, decode: Decode[Reply], waiting: Outstanding
    ) -> Iterator[Answer[Reply]]:
        if message.has_error() and self.fleet is not None and message.error.code in LOST:
            yield from self._missed(node, code_of(message.error), waiting)
        else:
            waiting.done(node)
            yield self._answer(node, message, decode)

    def _missed(self, node: int, code: str, waiting: Outstanding) -> Iterator[Answer[Reply]]:
        if waiting.lost(node, code, time.monotonic()):
            logger.info("%s is waited for: %s", self.name(node) or f"node {node}", code)
        else:
            yield Answer(node, None, code)

    def _ask_again(self, question: _Question, waiting: Outstanding) -> Iterator[Answer[Reply]]:
        """Ask lost nodes again that are back, and give up those that are away for too long."""
        now = time.monotonic()
        if due := waiting.due(now):
            online = set(self.online())
            yield from self._send(question, [node for node in due if node in online], waiting)
        for node, code in waiting.given_up(now):
            yield Answer(node, None, code)

    def _answer(self, node: int, message: Message, decode: Decode[Reply]) -> Answer[Reply]:
        if message.has_error():
            return Answer(node, None, code_of(message.error))
        size = content_bytes(message.content) if "fedtune" in message.content else 0
        self.traffic.up += size
        try:
            content = message.content if self.fleet is None else self.fleet.open(node, message.content)
        except EnvelopeError as error:
            if error.code == _SIGNED:
                return Answer(node, None, error.code, size, offence=True)
            # nobody knows who has sent this, so it is held against nobody
            return Answer(node, None, unsigned_code(message.content) or error.code, size)
        try:
            reply = decode(content)
            if isinstance(reply, Refusal):
                return Answer(node, None, reply.code, size)
            if node in self.sites:
                self.witness.accept(self.sites[node], reply.head)
        except FedtuneError as error:
            return Answer(node, None, error.code, size, offence=True)
        return Answer(node, reply, "", size)


def _question(
    kind: str, nodes: Sequence[int], asked: Instruction | Mapping[int, Instruction], began: float, until: float
) -> _Question:
    if isinstance(asked, Instruction):
        return _Question(kind, asked.round, dict.fromkeys(nodes, encode_instruction(asked)), began, until)
    number = max((one.round for one in asked.values()), default=0)
    return _Question(kind, number, encode_instructions(asked), began, until)
