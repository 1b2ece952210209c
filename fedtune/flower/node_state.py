"""A SuperNode's memory of its tasks that answers for every executor that dies, at whichever moment.

A SuperNode handles one message at a time and waits for its answer without end. Flower answers for an executor that is
not heard of for a minute, but only if that one had already fetched the message; one that died between fetching the
task and fetching the message would hold up its site for ever. And what a dead executor had not fetched whole would stay
in memory for ever. It also says when there is something new, for which Flower looks twice a second. Knows no
connection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from flwr.app import Message
from flwr.proto.task_pb2 import Task
from flwr.supercore.object_store import ObjectStore, ObjectStoreFactory
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState


class AnsweringState(InMemoryNodeState):
    """Flower's state, in which a message whose task has run out counts as fetched, and is dropped."""

    def __init__(self, object_store: ObjectStore) -> None:
        super().__init__(object_store)
        self._news = threading.Event()

    def wait(self, seconds: float) -> None:
        """Wait until a message or a part of one has come since the last wait, or for so long."""
        self._news.wait(seconds)
        self._news.clear()

    def has_replies(self) -> bool:
        """Whether a reply waits to be sent."""
        with self.lock_msg_store:
            entries = self.msg_store.values()
            return any(entry.message.metadata.reply_to_message_id and not entry.is_retrieved for entry in entries)

    def store_message(self, message: Message) -> str | None:
        """Store a message."""
        found = super().store_message(message)
        self._news.set()
        return found

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Store a part of a message."""
        stored = super().store_object(run_id, session_id, object_id, object_content)
        self._news.set()
        return stored

    def _on_task_tokens_expired(self, tasks: list[Task]) -> None:
        lost = {task.run_id for task in tasks}
        with self.lock_msg_store:
            for entry in self.msg_store.values():
                metadata = entry.message.metadata
                if metadata.run_id in lost and not metadata.reply_to_message_id:
                    entry.is_retrieved = True
                    self.object_store.delete(metadata.message_id)
        super()._on_task_tokens_expired(tasks)


class AnsweringStates(NodeStateFactory):
    """Makes the one state of a process."""

    def __init__(self) -> None:
        super().__init__(ObjectStoreFactory())
        self._state = AnsweringState(self.objectstore_factory.store())

    def state(self) -> AnsweringState:
        """Return the state."""
        return self._state


def sends_what_waits(pull: Callable[..., int | None], state: AnsweringState) -> Callable[..., int | None]:
    """Return a SuperNode's look for a message that also lets it send: what is not None makes it send replies.

    Flower's sends after it has received, and then whatever reply is there first. The reply to a message whose run has
    ended meanwhile may be that one; the reply that is waited for would then stay until the next message comes.
    """

    def look(**given: Any) -> int | None:
        found = pull(**given)
        return 0 if found is None and state.has_replies() else found

    return look
