"""What moving messages and keeping them on disk relies on in Flower 1.41 beyond its documented surface."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import message_pb2, runtime_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore import sql_mixin
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_id,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.object_store import object_store_factory
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.sql_mixin import SqlMixin
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode import start_client_internal
from flwr.supernode.runtime import run_clientapp


def source(thing: Any) -> str:
    return inspect.getsource(thing)


@pytest.fixture
def message() -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, SUPERLINK_NODE_ID
    record = ArrayRecord()
    record["w"] = Array("uint8", (3,), "raw", b"abc")
    return Message(RecordDict({"x": record, "c": ConfigRecord({"n": 1})}), 5, "train", ttl=60.0)


def test_arrays_travel_in_pieces_of_five_mebibytes() -> None:
    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE == 5 * 2**20


def test_objects_begin_with_their_kind_and_are_named_by_their_hash(message: Message) -> None:
    with no_object_id_recompute():
        for name, thing in get_all_nested_objects(message).items():
            content = thing.deflate()
            assert get_object_id(content) == name
            assert content.split(b" ")[0].decode() == type(thing).__name__
    chunk = ArrayChunk(memoryview(b"abc")).deflate()
    assert chunk == b"ArrayChunk  3\0abc"
    assert get_object_body(chunk, ArrayChunk) == b"abc"


def test_a_message_can_hold_its_records_inside_which_flowers_own_objects_do_not(message: Message) -> None:
    proto = message_to_proto(message)
    assert proto.HasField("content")
    assert message_from_proto(message_pb2.Message.FromString(proto.SerializeToString())).content == message.content
    own = message_pb2.Message.FromString(get_object_body(message.deflate(), Message))
    assert not own.HasField("content")
    assert not own.HasField("error")
    assert "if metadata.message_id" not in source(Message.deflate)
    assert 'proto_metadata.message_id = ""' in source(Message.deflate)


def test_flowers_own_messages_are_inflated_from_their_objects(message: Message) -> None:
    objects = get_all_nested_objects(message)
    contents = {name: thing.deflate() for name, thing in objects.items()}
    found = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(found, Message)
    assert found.content == message.content


def test_pulling_waits_for_objects_on_their_way_and_pushing_takes_what_is_given() -> None:
    assert {"initial_backoff", "backoff_cap"} <= set(inspect.signature(pull_objects).parameters)
    seen = dict[str, bytes]()
    push_object_contents_from_iterable([("a", b"1"), ("b", b"2")], lambda name, data: seen.update({name: data}))
    assert seen == {"a": b"1", "b": b"2"}
    calls = list[str]()

    def fetch(name: str) -> bytes:
        calls.append(name)
        if len(calls) == 1:
            raise ObjectUnavailableError(name)
        return b"x"

    assert pull_objects(["a"], fetch, initial_backoff=0.01, backoff_cap=0.01) == {"a": b"x"}


def test_one_object_is_asked_for_and_sent_by_these_functions() -> None:
    answers = iter(
        [
            message_pb2.PullObjectResponse(object_found=True, object_available=True, object_content=b"x"),
            message_pb2.PullObjectResponse(object_found=True, object_available=False),
            message_pb2.PullObjectResponse(object_found=False),
        ]
    )
    fetch = make_pull_object_fn_protobuf(lambda request: next(answers), Node(node_id=1), 7)
    assert fetch("a") == b"x"
    with pytest.raises(ObjectUnavailableError):
        fetch("a")
    with pytest.raises(ObjectPullError):
        fetch("a")
    asked = list[Any]()

    def push(request: Any) -> message_pb2.PushObjectResponse:
        asked.append(request)
        return message_pb2.PushObjectResponse(stored=True)

    make_push_object_fn_protobuf(push, Node(node_id=1), 7, "s")("a", b"x")
    assert (asked[0].object_id, asked[0].object_content, asked[0].session_id, asked[0].run_id) == ("a", b"x", "s", 7)


def test_a_message_travels_beside_its_objects_without_content(message: Message) -> None:
    message.metadata.__dict__["_message_id"] = "m"
    bare = message_from_proto(message_to_proto(remove_content_from_message(message)))
    assert bare.metadata.message_id == "m"
    assert bare.content == RecordDict()
    assert make_message(bare.metadata, error=Error(3, "message.lost")).error.reason == "message.lost"
    assert dataclasses.is_dataclass(Error) or Error(3, "x").code == 3


def test_the_runtime_api_takes_what_the_executors_ask() -> None:
    assert runtime_pb2.PushAppMessagesRequest(messages_list=[], message_object_trees=[]) is not None
    assert runtime_pb2.PullAppMessagesRequest(message_ids={"a"}).message_ids == ["a"]
    names = {field.name for field in runtime_pb2.PushAppMessagesResponse.DESCRIPTOR.fields}
    assert {"message_ids", "objects_to_push", "session_id"} <= names
    names = {field.name for field in runtime_pb2.PullTaskInputResponse.DESCRIPTOR.fields}
    assert {"context", "run", "fab", "task_id"} <= names
    assert message_pb2.ConfirmMessageReceivedRequest(node=Node(node_id=1), run_id=7, message_object_id="a") is not None
    assert list(runtime_pb2.GetNodesResponse(nodes=[]).nodes) == []


def test_the_steps_of_flowers_own_executor_are_those_of_ours() -> None:
    pulled, pushed = source(run_clientapp.pull_task_input), source(run_clientapp.push_message)
    for step in ("client.PullTaskInput(", "TaskIdentity.task_id = res.task_id", "client.PullMessages("):
        assert step in pulled
    assert "client.ConfirmMessageReceived" in pulled
    assert (
        pushed.index("get_object_tree(message)") < pushed.index("client.PushMessages(") < pushed.index("push_objects(")
    )


def test_the_steps_of_flowers_own_grid_are_those_of_ours() -> None:
    text = source(HttpGrid.pull_messages)
    assert text.index(".PullMessages(") < text.index("pull_objects(") < text.index("ConfirmMessageReceived(")
    assert "except ObjectPullError" in text  # and no other error: the reason for a grid of our own
    assert "for future in concurrent.futures.as_completed(futures)" in source(inflatable_utils.pull_objects)


def test_a_reply_is_named_to_the_coordinator_once_and_its_objects_are_dropped_when_it_says_so() -> None:
    text = source(runtime_handlers.pull_messages)
    assert text.index("state.get_message_res(") < text.index("state.delete_messages(")
    assert "state.object_store.delete(request.message_object_id)" in source(runtime_handlers.confirm_message_received)


def test_a_site_sends_the_root_of_a_reply_last() -> None:
    text = source(start_client_internal._push_messages)
    assert "for tree in iterate_object_tree(_obj_tree):" in text  # children before parents


# The database --------------------------------------------------------------------------------------------------------


def test_every_transaction_goes_through_one_method_that_may_be_entered_again() -> None:
    assert hasattr(SqlMixin.session, "__wrapped__")  # a context manager
    assert "yield existing" in source(SqlMixin.session)
    assert "with self.session() as session:" in source(SqlMixin.query)


def test_the_settings_of_a_connection_are_looked_up_when_it_is_made() -> None:
    assert "for pragma, value in SQLITE_PRAGMAS:" in source(sql_mixin._set_sqlite_pragmas)
    assert {name for name, _ in sql_mixin.SQLITE_PRAGMAS} == {
        "busy_timeout", "cache_size", "foreign_keys", "journal_mode", "mmap_size", "synchronous", "temp_store"
    }  # fmt: skip


def test_the_store_is_made_from_a_name_that_can_be_replaced() -> None:
    assert "store = SqlObjectStore(self.database)" in source(ObjectStoreFactory.store)
    assert object_store_factory.SqlObjectStore is SqlObjectStore
    assert list(inspect.signature(SqlObjectStore.__init__).parameters) == ["self", "database_path", "verify"]


def test_the_store_deletes_children_and_runs_through_the_method_that_removes_files() -> None:
    assert "self.delete(child_id)" in source(SqlObjectStore.delete)
    assert "self.delete(object_id)" in source(SqlObjectStore.delete_objects_in_run)
    assert ".values(content=object_content, is_available=1)" in source(SqlObjectStore.put)
