"""A SuperLink's state as Flower makes it, in this process: one run, its nodes, and both ends of its two APIs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_federation_manager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

from fedtune.flower.object_files import ObjectFiles
from fedtune.flower.remote_grid import RemoteGrid
from fedtune.flower.transfer import Parcels, receive


class _Client:
    """A task's connection that calls Flower's own handlers at once."""

    def __init__(self, state: SqlLinkState, task: Any) -> None:
        self._state, self._task = state, task

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
        return lambda request: getattr(runtime_handlers, snake)(request, self._state, self._task)


@dataclass
class LinkState:
    """The state in a folder; `grid` is the coordinator's end, `pull` and `push` are a site's."""

    path: Path
    state: SqlLinkState
    run: int = 0
    nodes: list[int] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path, nodes: int = 1, store: Callable[[str], Any] = ObjectFiles) -> LinkState:
        path = folder / "link.db"
        path.write_bytes(new_database())
        objects = store(str(path))
        objects.initialize()
        state = SqlLinkState(str(path), get_federation_manager(), cast(ObjectStore, objects))
        state.initialize()
        made = cls(path, state)
        for _ in range(nodes):
            node = state.create_node("", "", os.urandom(16), 30)
            state.activate_node(node, 30)
            made.nodes.append(node)
        made.start()
        return made

    def start(self) -> RemoteGrid:
        """Start another run and return its grid."""
        self.run = self.state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, "", TaskType.SERVER_APP)
        (task,) = self.state.get_tasks(run_ids=[self.run])
        self.state.claim_task(task.task_id)
        self.state.activate_task(task.task_id)
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, self.run
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        return self.grid

    def finish(self) -> None:
        """End the run as an executor does."""
        (task,) = self.state.get_tasks(run_ids=[self.run])
        self.state.finish_task(task.task_id, SubStatus.COMPLETED, "")

    @property
    def grid(self) -> RemoteGrid:
        (task,) = self.state.get_tasks(run_ids=[self.run])
        client = cast(RuntimeHttpClient, _Client(self.state, task))
        return RemoteGrid(client, Run.create_empty(run_id=self.run))

    def pull(self, node: int) -> Message | None:
        """Fetch a site's next message whole, and confirm it."""
        found = fleet_handlers.pull_messages(
            PullMessagesRequest(node=Node(node_id=node)), self.state, self.state.object_store
        )
        if not found.messages_list:
            return None
        tree = found.message_object_trees[0]
        asked = Node(node_id=node)
        message = receive(tree, make_pull_object_fn_protobuf(self._call(fleet_handlers.pull_object), asked, self.run))
        taken = ConfirmMessageReceivedRequest(node=asked, run_id=self.run, message_object_id=tree.object_id)
        fleet_handlers.confirm_message_received(taken, self.state, self.state.object_store)
        message.__dict__["_metadata"] = message_from_proto(found.messages_list[0]).metadata
        return message

    def push(self, node: int, reply: Message) -> str:
        """Send a site's reply and return its name."""
        name, send = self.announce(node, reply)
        send()
        return name

    def announce(self, node: int, reply: Message) -> tuple[str, Callable[[], None]]:
        """Send a site's reply without its objects; return its name and what sends them."""
        parcels, sender = Parcels(), Node(node_id=node)
        tree = parcels.add(reply)
        bare = message_to_proto(remove_content_from_message(reply))
        request = PushMessagesRequest(
            node=sender, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[0.1]
        )
        answer = fleet_handlers.push_messages(request, self.state)
        push = make_push_object_fn_protobuf(self._call(fleet_handlers.push_object), sender, self.run, answer.session_id)
        return tree.object_id, lambda: parcels.send(set(answer.objects_to_push), push)

    def database_bytes(self) -> int:
        """Return the bytes of the database when its log has been written to it."""
        self.state.query("PRAGMA wal_checkpoint(TRUNCATE)")
        return self.path.stat().st_size

    def object_bytes(self) -> int:
        """Return the bytes of the files beside it."""
        return sum(path.stat().st_size for path in self.path.with_name("link.db.objects").iterdir())

    def _call(self, handler: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda request: handler(request, self.state)


@cache
def new_database() -> bytes:
    """Return a database with Flower's tables, which take a second to make."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "new.db")
        made = ObjectFiles(str(path))
        made.initialize()
        assert made._engine is not None
        with made._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        made._engine.dispose()
        return path.read_bytes()


def message(node: int, size: int, seed: int = 0, *, ttl: float = 60.0) -> Message:
    """Return a message to a node with so many random bytes."""
    return Message(content(size, seed), node, "train", ttl=ttl)


def content(size: int, seed: int = 0) -> RecordDict:
    """Return a content of so many random bytes, in two arrays."""
    data = np.random.default_rng(seed).bytes(size)
    record = ArrayRecord()
    record["a"] = Array("uint8", (size // 3,), "raw", data[: size // 3])
    record["b"] = Array("uint8", (size - size // 3,), "raw", data[size // 3 :])
    return RecordDict({"x": record, "c": ConfigRecord({"seed": seed})})


def reply_to(asked: Message, body: RecordDict) -> Message:
    """Return a site's reply, which this process makes in the site's place."""
    metadata = asked.metadata
    return make_message(
        Metadata(
            run_id=metadata.run_id,
            message_id="",
            src_node_id=metadata.dst_node_id,
            dst_node_id=metadata.src_node_id,
            reply_to_message_id=metadata.message_id,
            group_id=metadata.group_id,
            created_at=metadata.created_at,
            ttl=metadata.ttl,
            message_type=metadata.message_type,
        ),
        content=body,
    )
