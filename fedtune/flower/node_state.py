"""A SuperNode's memory of its tasks that answers for every executor that dies, at whichever moment.

A SuperNode handles one message at a time and waits for its answer without end. Flower answers for an executor that is
not heard of for a minute, but only if that one had already fetched the message; one that died between fetching the
task and fetching the message would hold up its site for ever. Knows no connection.
"""

from __future__ import annotations

from flwr.proto.task_pb2 import Task
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate import NodeState, NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState


class AnsweringState(InMemoryNodeState):
    """Flower's state, in which a message whose task has run out counts as fetched."""

    def _on_task_tokens_expired(self, tasks: list[Task]) -> None:
        lost = {task.run_id for task in tasks}
        with self.lock_msg_store:
            for entry in self.msg_store.values():
                metadata = entry.message.metadata
                if metadata.run_id in lost and not metadata.reply_to_message_id:
                    entry.is_retrieved = True
        super()._on_task_tokens_expired(tasks)


class AnsweringStates(NodeStateFactory):
    """Makes the one state of a process."""

    def __init__(self) -> None:
        super().__init__(ObjectStoreFactory())

    def state(self) -> NodeState:
        """Return the state."""
        with self.lock:
            if self.state_instance is None:
                self.state_instance = AnsweringState(self.objectstore_factory.store())
            return self.state_instance
