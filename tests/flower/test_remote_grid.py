"""The coordinator's grid over Flower's own state and handlers, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_object_id

from fedtune.flower.body import body_digest
from fedtune.flower.failures import LOST, code_of
from tests.support.link_state import LinkState, content, message, reply_to

MEGABYTE = 1_000_000


@pytest.fixture
def link(tmp_path: Path) -> LinkState:
    return LinkState.make(tmp_path, nodes=3)


def answered(link: LinkState, node: int, body: RecordDict) -> None:
    asked = link.pull(node)
    assert asked is not None
    link.push(node, reply_to(asked, body))


def test_a_message_and_its_reply_arrive_as_they_were_sent(link: LinkState) -> None:
    grid, node = link.grid, link.nodes[0]
    sent = message(node, 7 * MEGABYTE)
    (name,) = grid.push_messages([sent])
    assert grid.pull_messages([name]) == []
    asked = link.pull(node)
    assert asked is not None
    assert body_digest(asked.content) == body_digest(sent.content)
    answer = content(6 * MEGABYTE, seed=1)
    link.push(node, reply_to(asked, answer))
    (reply,) = grid.pull_messages([name])
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (node, name)
    assert body_digest(reply.content) == body_digest(answer)
    assert len(link.state.object_store) == 0


def test_an_adapter_that_goes_to_every_site_is_stored_once(link: LinkState) -> None:
    shared = content(3 * MEGABYTE)
    link.grid.push_messages([Message(shared, node, "train", ttl=60.0) for node in link.nodes])
    assert 3 * MEGABYTE < link.object_bytes() < 3.1 * MEGABYTE


def test_large_replies_come_one_at_a_time_and_small_ones_together(link: LinkState) -> None:
    grid = link.grid
    names = grid.push_messages([message(node, 100) for node in link.nodes])
    for number, node in enumerate(link.nodes):
        answered(link, node, content(9 * MEGABYTE, seed=number))
    waiting = set(names)
    while waiting:
        (reply,) = grid.pull_messages(waiting)
        waiting.remove(reply.metadata.reply_to_message_id)
    names = grid.push_messages([message(node, 100) for node in link.nodes])
    for number, node in enumerate(link.nodes):
        answered(link, node, content(1000, seed=number))
    assert len(grid.pull_messages(names)) == 3


def test_a_reply_that_is_still_being_sent_holds_up_nobody(link: LinkState) -> None:
    grid = link.grid
    names = grid.push_messages([message(node, 100) for node in link.nodes[:2]])
    slow = link.pull(link.nodes[0])
    assert slow is not None
    _, send = link.announce(link.nodes[0], reply_to(slow, content(MEGABYTE)))
    answered(link, link.nodes[1], content(1000))
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(names)] == [link.nodes[1]]
    assert grid.pull_messages(names[:1]) == []
    send()
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(names[:1])] == [link.nodes[0]]


def test_a_reply_whose_objects_are_gone_is_a_lost_message(link: LinkState) -> None:
    grid, node = link.grid, link.nodes[0]
    names = grid.push_messages([message(node, 100)])
    asked = link.pull(node)
    assert asked is not None
    name = link.push(node, reply_to(asked, content(MEGABYTE)))
    grid._announce(set(names))
    link.state.object_store.delete(name)
    (reply,) = grid.pull_messages(names)
    assert reply.error.code in LOST
    assert reply.metadata.reply_to_message_id == names[0]


def test_a_reply_that_cannot_be_read_is_an_error_of_its_site_and_the_others_are_kept(link: LinkState) -> None:
    grid = link.grid
    names = grid.push_messages([message(node, 100) for node in link.nodes[:2]])
    asked = link.pull(link.nodes[0])
    assert asked is not None
    lying = RecordDict({"packed": ConfigRecord({"list": "no list"})})
    push_as_it_is(link, link.nodes[0], reply_to(asked, lying))
    answered(link, link.nodes[1], content(1000))
    replies = {reply.metadata.src_node_id: reply for reply in grid.pull_messages(names)}
    assert code_of(replies[link.nodes[0]].error) == "message.unreadable"
    assert replies[link.nodes[0]].error.code not in LOST
    assert replies[link.nodes[1]].has_content()


def test_a_reply_counts_for_the_message_that_its_site_was_sent(link: LinkState) -> None:
    """What a site writes into the message itself is not asked: it could name another site's message."""
    grid = link.grid
    names = grid.push_messages([message(node, 100) for node in link.nodes[:2]])
    mine, other = link.pull(link.nodes[0]), link.pull(link.nodes[1])
    assert mine is not None
    assert other is not None
    push_as_it_is(link, link.nodes[0], reply_to(other, content(1000)), as_reply_to=mine)
    (reply,) = grid.pull_messages(names)
    assert reply.metadata.src_node_id == link.nodes[0]
    assert reply.metadata.reply_to_message_id == mine.metadata.message_id


def test_what_a_site_that_is_away_was_sent_is_dropped_with_its_error(link: LinkState) -> None:
    grid, node = link.grid, link.nodes[0]
    names = grid.push_messages([message(node, MEGABYTE)])
    link.state.deactivate_node(node)
    (reply,) = grid.pull_messages(names)
    assert reply.error.code == ErrorCode.NODE_UNAVAILABLE
    assert len(link.state.object_store) == 0
    assert link.object_bytes() == 0


def test_an_error_of_a_site_arrives_with_its_code(link: LinkState) -> None:
    grid, node = link.grid, link.nodes[0]
    names = grid.push_messages([message(node, 100)])
    asked = link.pull(node)
    assert asked is not None
    answer = reply_to(asked, RecordDict())
    answer.__dict__.update(_content=None, _error=Error(ErrorCode.MOD_FAILED_PRECONDITION, "policy.refused"))
    link.push(node, answer)
    (reply,) = grid.pull_messages(names)
    assert code_of(reply.error) == "policy.refused"


def test_an_unknown_node_is_an_empty_name_and_sending_nothing_is_nothing(link: LinkState) -> None:
    known, unknown = link.grid.push_messages([message(link.nodes[0], 100), message(12345, 100)])
    assert known
    assert not unknown
    assert link.grid.push_messages([]) == []


def test_sending_and_receiving_ends_with_the_last_reply_or_with_its_time(link: LinkState) -> None:
    grid, node = link.grid, link.nodes[0]
    assert grid.send_and_receive([message(node, 100)], timeout=0.0) == []
    link.state.deactivate_node(node)
    (reply,) = grid.send_and_receive([message(node, 100)])
    assert reply.has_error()


def push_as_it_is(link: LinkState, node: int, reply: Message, as_reply_to: Message | None = None) -> None:
    """Push a reply as a hostile site can: unpacked, and with other metadata outside than inside."""
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
    from flwr.superlink.servicer.fleet import fleet_handlers

    objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
    outside = reply if as_reply_to is None else reply_to(as_reply_to, RecordDict())
    outside.metadata.__dict__["_message_id"] = get_object_id(reply.deflate())
    bare = message_to_proto(Message(metadata=outside.metadata, content=RecordDict()))  # type: ignore[call-overload]
    request = PushMessagesRequest(
        node=Node(node_id=node), messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[0.1]
    )
    answer = fleet_handlers.push_messages(request, link.state)
    for name, thing in objects.items():
        if name in answer.objects_to_push:
            assert link.state.store_object(link.run, answer.session_id, name, thing.deflate())
