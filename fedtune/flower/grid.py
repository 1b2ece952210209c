"""A Flower grid that drives a `ClientApp` in this process: no Ray, no SuperLink, no threads.

Messages are executed when replies are pulled, one after another, so that one base model serves every site, the order
of work is the order of sending, and memory does not grow with the number of sites. A pull returns after a short slice
of work, so that the caller can show progress between replies.

Uses `flwr.supercore` for the run and the task identity (see tests/contract/test_flower.py).
"""

from __future__ import annotations

import copy
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedtune.flower.messages import content_bytes

_SLICE_SECONDS = 0.02
_SLICE_BYTES = 8_000_000
_FIRST_NODE = 2  # Flower's node 1 is the SuperLink


class InProcessGrid(Grid):
    """Executes messages in this process, in the order of sending, as they are pulled.

    A reply that is ready after its message's time to live is dropped and an expired message is never started, as a
    SuperLink would do. An exception at a site becomes an error reply with a code and without text.
    """

    def __init__(self, app: ClientApp, nodes: int, run_config: Mapping[str, str], *, run_id: int = 1) -> None:
        self._app = app
        self._run = Run.create_empty(run_id=run_id)
        self._contexts = {_FIRST_NODE + index: _context(index, nodes, run_config, run_id) for index in range(nodes)}
        self._queue: OrderedDict[str, Message] = OrderedDict()
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all simulated nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages and return their ids; nothing runs yet."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Execute queued messages for a short while and return their replies; the rest stays queued."""
        wanted = message_ids if isinstance(message_ids, (set, frozenset, dict)) else set(message_ids)
        replies: list[Message] = []
        started, size = time.monotonic(), 0
        for identifier in [key for key in self._queue if key in wanted]:
            message = self._queue.pop(identifier)
            reply = self._execute(message)
            if reply is not None:
                replies.append(reply)
                size += 0 if reply.has_error() else content_bytes(reply.content)
            if size > _SLICE_BYTES or time.monotonic() - started > _SLICE_SECONDS:
                break
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for every reply, or for `timeout` seconds."""
        pending = set(self.push_messages(messages))
        replies: list[Message] = []
        until = None if timeout is None else time.monotonic() + timeout
        while pending & self._queue.keys() and (until is None or time.monotonic() < until):
            replies.extend(self.pull_messages(pending))
        return replies

    def _push(self, message: Message) -> str:
        identifier = uuid.uuid4().hex
        message.metadata.__dict__["_message_id"] = identifier
        self._queue[identifier] = message
        return identifier

    def _execute(self, message: Message) -> Message | None:
        if _expired(message):
            return None
        context = self._contexts[message.metadata.dst_node_id]
        try:
            reply = self._app(_private_copy(message), context)
            reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        except Exception:  # noqa: BLE001 - whatever a site raises leaves it as a code, as in Flower's own runtimes
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "site.internal"), reply_to=message)
        return None if _expired(message) else reply


def _context(index: int, nodes: int, run_config: Mapping[str, str], run_id: int) -> Context:
    node_config: UserConfig = {"partition-id": index, "num-partitions": nodes}
    return Context(run_id, _FIRST_NODE + index, node_config, RecordDict(), dict(run_config))


def _expired(message: Message) -> bool:
    return time.time() > message.metadata.created_at + message.metadata.ttl


def _private_copy(message: Message) -> Message:
    """Give each site its own records over the shared immutable bytes, so that no edit reaches another site."""
    private: Message = copy.copy(message)
    private.__dict__["_content"] = RecordDict({name: _copied(record) for name, record in message.content.items()})
    return private


def _copied(record: Any) -> Any:
    private = record.copy()
    for name, value in record.items():
        if isinstance(value, (Array, list)):
            private[name] = copy.copy(value)
    return private
