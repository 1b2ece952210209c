from __future__ import annotations

import threading
from datetime import timedelta

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity

from fedtune.flower.node_state import AnsweringStates, sends_what_waits

RUN = 7


def test_the_message_of_an_executor_that_died_is_answered_and_leaves_nothing_in_memory() -> None:
    factory = AnsweringStates()
    state, store = factory.state(), factory.objectstore_factory.store()
    assert isinstance(store, InMemoryObjectStore)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SUPERLINK_NODE_ID
    content = RecordDict({"x": ArrayRecord(), "c": ConfigRecord({"adapter": bytes(10_000)})})
    message = Message(content, 5, "train", ttl=60.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    store.preregister(RUN, get_object_tree(message))
    for name, thing in get_all_nested_objects(message).items():
        store.put(name, thing.deflate())
    state.store_message(message)
    state.record_message_processing_start(message.metadata.message_id)
    task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN, fab_hash="f")
    assert task is not None
    assert state.claim_task(task)
    assert state.activate_task(task)
    for claim in state.task_token_store.values():
        claim.active_until = now() - timedelta(seconds=1)
    (reply,) = state.get_messages_legacy(is_reply=True)
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert sum(len(entry.content) for entry in store.store.values()) < 1_000


def test_a_wait_ends_with_the_next_message_or_with_its_time() -> None:
    state = AnsweringStates().state()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SUPERLINK_NODE_ID
    message = Message(RecordDict(), 5, "train", ttl=60.0)
    message.metadata.__dict__["_message_id"] = "m"
    waiting = threading.Thread(target=state.wait, args=(60.0,))
    waiting.start()
    state.store_message(message)
    waiting.join(10)
    assert not waiting.is_alive()
    state.wait(0.01)


def test_a_reply_that_waits_is_sent_though_no_message_comes() -> None:
    state = AnsweringStates().state()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SUPERLINK_NODE_ID
    asked = Message(RecordDict(), 5, "train", ttl=60.0)
    asked.metadata.__dict__["_message_id"] = "asked"
    state.store_message(asked)
    look = sends_what_waits(lambda **_: None, state)
    assert look() is None
    reply = Message(RecordDict(), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = "reply"
    state.store_message(reply)
    assert look() is not None  # control: Flower's own look says None, and the reply waits for the next message
    assert [message.metadata.message_id for message in state.get_messages_legacy(is_reply=True)] == ["reply"]
    assert look() is None


def test_a_message_that_comes_is_worked_on_as_ever() -> None:
    assert sends_what_waits(lambda **given: given["run"], AnsweringStates().state())(run=RUN) == RUN
