"""A run's grid at the coordinator: messages to sites through the SuperLink of this machine, on a task's connection.

Flower's own grid fetches every reply that is there before it returns one, waits for hours for a reply that is still
being sent, and ends the run at a reply whose objects do not fit together. This one returns what is whole, a few
megabytes or one message at a time, so that memory does not grow with the number of sites; a reply that cannot be read
becomes an error reply with a code. Knows no study.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import GetNodesRequest, PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient

from fedtune.errors import MessageError
from fedtune.flower.messages import content_bytes
from fedtune.flower.transfer import Parcels, receive

_SLICE_BYTES = 8_000_000
_POLL = 0.1
_NODE = Node(node_id=SUPERLINK_NODE_ID)


@dataclass(frozen=True, slots=True)
class _Announced:
    """A reply that the SuperLink has handed over by name; its objects are fetched when it is asked for."""

    metadata: Metadata
    tree: ObjectTree


class RemoteGrid(Grid):
    """Sends and fetches messages of one run over a task's connection, which stays its owner's."""

    def __init__(self, client: RuntimeHttpClient, run: Run) -> None:
        self._client, self._run = client, run
        self._announced: dict[str, _Announced] = {}
        self._fetch = make_pull_object_fn_protobuf(client.PullObject, _NODE, run.run_id)

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
        """Return the numbers of the nodes that are connected."""
        return [node.node_id for node in self._client.GetNodes(GetNodesRequest()).nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their names; an empty one where a node is unknown."""
        messages, parcels = list(messages), Parcels()
        if not messages:
            return []
        trees = [parcels.add(message) for message in messages]
        bare = [message_to_proto(remove_content_from_message(message)) for message in messages]
        asked = PushAppMessagesRequest(messages_list=bare, message_object_trees=trees)
        answer = self._client.PushMessages(asked)
        push = make_push_object_fn_protobuf(self._client.PushObject, _NODE, self._run.run_id, answer.session_id)
        parcels.send(set(answer.objects_to_push), push)
        return list(answer.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return replies that are there: a few megabytes at a time, and one at least if there is one."""
        wanted = set(message_ids)
        self._announce(wanted - self._announced.keys())
        found, size = list[Message](), 0
        for asked in [asked for asked in self._announced if asked in wanted]:
            reply = self._take(asked)
            if reply is not None:
                found.append(reply)
                size += 0 if reply.has_error() else content_bytes(reply.content)
            if size > _SLICE_BYTES:
                break
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for every reply, or for `timeout` seconds."""
        pending = set(self.push_messages(messages)) - {""}
        replies = list[Message]()
        until = None if timeout is None else time.monotonic() + timeout
        while pending and (until is None or time.monotonic() < until):
            found = self.pull_messages(pending)
            pending -= {reply.metadata.reply_to_message_id for reply in found}
            replies += found
            if not found:
                time.sleep(_POLL)
        return replies

    def _announce(self, wanted: set[str]) -> None:
        """Ask which replies there are; the SuperLink names each of them once."""
        if not wanted:
            return
        answer = self._client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
        for bare, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            metadata = message_from_proto(bare).metadata
            self._announced[metadata.reply_to_message_id] = _Announced(metadata, tree)

    def _take(self, asked: str) -> Message | None:
        """Return a reply, or None while its site is still sending it: the root of its objects is sent last."""
        reply = self._announced[asked]
        try:
            message = receive(reply.tree, self._fetch, self._fetch(reply.tree.object_id))
            message.__dict__["_metadata"] = reply.metadata  # the SuperLink's, which has checked whose reply it is
        except ObjectUnavailableError:
            return None
        except ObjectPullError:
            message = make_message(reply.metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, "message.lost"))
        except MessageError as error:
            message = make_message(reply.metadata, error=Error(ErrorCode.MOD_FAILED_PRECONDITION, error.code))
        del self._announced[asked]
        self._release(reply.tree.object_id)
        if message.has_error():
            self._release(asked)  # nobody else will: no site has fetched it
        return message

    def _release(self, name: str) -> None:
        """Let the SuperLink drop a message's objects."""
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=_NODE, run_id=self._run.run_id, message_object_id=name)
        )
