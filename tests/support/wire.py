"""A grid between a coordinator and three signed sites, on which nodes go away, lose messages and answer late."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from tests.support.parties import STUDY
from tests.support.sealed_world import SITES, World

NODES = {11: "bank-1", 12: "bank-2", 13: "bank-3"}
Act = Callable[[str, RecordDict], RecordDict]


@dataclass
class Wire:
    """Delivers each message at once, and its reply when replies are pulled; `act` is what a site makes of a request.

    `away` nodes are not connected; of the messages to a node in `losses` so many end in that error of Flower's; a node
    in `slow` has its reply held back for so many pulls.
    """

    world: World
    act: Act | None = None
    away: set[int] = field(default_factory=set)
    losses: dict[int, list[int]] = field(default_factory=dict)
    slow: dict[int, int] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    _queue: dict[str, tuple[Message, int]] = field(default_factory=dict)

    def get_node_ids(self) -> list[int]:
        return [node for node in NODES if node not in self.away]

    def create_message(
        self, content: RecordDict, kind: str, node: int, group: str, ttl: float | None = None
    ) -> Message:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        return Message(content, node, kind, ttl=ttl, group_id=group)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            identifier = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = identifier
            node = message.metadata.dst_node_id
            self._queue[identifier] = (self._reply(message), self.slow.pop(node, 0))
            self.sent.append(node)
            pushed.append(identifier)
        return pushed

    def pull_messages(self, wanted: Iterable[str]) -> list[Message]:
        replies = []
        for identifier in [key for key in wanted if key in self._queue]:
            reply, pulls = self._queue.pop(identifier)
            if pulls:
                self._queue[identifier] = (reply, pulls - 1)
            else:
                replies.append(reply)
        return replies

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if self.losses.get(node):
            code = self.losses[node].pop(0)
            reason = "site.stopped" if code == ErrorCode.CLIENT_APP_CRASHED else "the node is gone, says Flower"
            return Message(Error(code, reason), reply_to=message)
        act: Any = self.act or self.world.serve
        return Message(act(NODES[node], message.content), reply_to=message)


__all__ = ["NODES", "SITES", "STUDY", "Wire"]
