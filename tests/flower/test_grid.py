"""Sites in one process behave like sites far away: in order, in time, apart from each other, silent when they fail."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune.flower import grid as grid_module

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedtune.flower.grid import InProcessGrid

    MakeGrid = Callable[..., InProcessGrid]

CANARY = "patient 4711 has"


def content(text: str = "x") -> RecordDict:
    arrays = ArrayRecord({"w": Array("float32", (1,), "raw", b"abcd")})
    return RecordDict({"c": ConfigRecord({"text": text, "list": [1, 2]}), "a": arrays})


def echo(message: Message, context: Context) -> Message:
    answer = ConfigRecord({"node": context.node_id, "part": context.node_config["partition-id"]})
    return Message(RecordDict({"c": answer}), reply_to=message)


def send(grid: InProcessGrid, shared: RecordDict | None = None, ttl: float | None = None) -> list[str]:
    shared = shared or content()
    return list(
        grid.push_messages(grid.create_message(shared, "train", node, "1", ttl) for node in grid.get_node_ids())
    )


def test_each_node_answers_its_own_message_in_the_order_of_sending(make_grid: MakeGrid) -> None:
    grid = make_grid(echo, nodes=5)
    sent = send(grid)
    replies = list(grid.pull_messages(sent))
    assert [reply.metadata.reply_to_message_id for reply in replies] == sent
    assert [reply.content["c"]["node"] for reply in replies] == list(grid.get_node_ids())
    assert [reply.content["c"]["part"] for reply in replies] == list(range(5))
    assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())
    assert list(grid.pull_messages(sent)) == []


def test_only_what_is_asked_for_is_run(make_grid: MakeGrid) -> None:
    grid = make_grid(echo)
    first, second, third = send(grid)
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages([second])] == [second]
    assert {reply.metadata.reply_to_message_id for reply in grid.pull_messages([first, third])} == {first, third}


def test_nothing_runs_before_it_is_pulled_and_slow_sites_come_one_at_a_time(make_grid: MakeGrid) -> None:
    started: list[int] = []

    def slow(message: Message, context: Context) -> Message:
        started.append(context.node_id)
        time.sleep(0.03)  # longer than a pull's slice
        return echo(message, context)

    grid = make_grid(slow)
    sent = send(grid)
    assert started == []
    for done in range(1, 4):
        assert len(list(grid.pull_messages(sent))) == 1
        assert len(started) == done


def test_a_pull_of_large_replies_ends_before_memory_fills(make_grid: MakeGrid) -> None:
    payload = bytes(grid_module._SLICE_BYTES)

    def large(message: Message, context: Context) -> Message:
        return Message(RecordDict({"a": ArrayRecord({"w": Array("float32", (1,), "raw", payload)})}), reply_to=message)

    grid = make_grid(large, nodes=6)
    assert len(list(grid.pull_messages(send(grid)))) <= 2


def test_an_expired_message_is_never_started(make_grid: MakeGrid) -> None:
    started: list[int] = []

    def train(message: Message, context: Context) -> Message:
        started.append(context.node_id)
        return echo(message, context)

    grid = make_grid(train)
    sent = send(grid, ttl=0.01)
    time.sleep(0.02)
    assert list(grid.pull_messages(sent)) == []
    assert started == []


def test_a_reply_after_the_time_to_live_is_dropped_and_an_early_one_is_not(make_grid: MakeGrid) -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.15)
        return echo(message, context)

    assert pull_one(make_grid(slow, 1), 0.1) == []
    assert len(pull_one(make_grid(slow, 1), 5.0)) == 1


def pull_one(grid: InProcessGrid, ttl: float) -> list[Message]:
    return list(grid.pull_messages(send(grid, ttl=ttl)))


def raise_with_text(message: Message, context: Context) -> Message:
    raise ValueError(CANARY)


def return_nothing(message: Message, context: Context) -> Any:
    return None


@pytest.mark.parametrize("fail", [raise_with_text, return_nothing])
def test_a_failing_site_is_an_error_code_without_text_and_the_others_answer(make_grid: MakeGrid, fail: Any) -> None:
    def train(message: Message, context: Context) -> Message:
        return fail(message, context) if context.node_config["partition-id"] == 1 else echo(message, context)

    first, failed, last = replies_of(make_grid(train))
    assert first.has_content()
    assert last.has_content()
    assert failed.has_error()
    assert (failed.error.code, failed.error.reason) == (2, "site.internal")


def replies_of(grid: InProcessGrid) -> list[Message]:
    return list(grid.pull_messages(send(grid)))


def everything_in(value: Any, seen: set[int] | None = None) -> str:
    """Return the text of an object and of all that it refers to."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return ""
    seen.add(id(value))
    held = [getattr(value, name, None) for name in ("__cause__", "__context__", "__traceback__")]
    held += [*getattr(value, "__dict__", {}).values(), *getattr(value, "args", ())]
    return " ".join([repr(value), *(everything_in(part, seen) for part in held)])


def test_the_text_of_an_exception_is_nowhere_in_the_reply(make_grid: MakeGrid) -> None:
    replies = replies_of(make_grid(raise_with_text))
    assert len(replies) == 3
    assert all(CANARY not in everything_in(reply) for reply in replies)
    assert CANARY in everything_in(ValueError(CANARY))  # the search would find it


def vandal(message: Message, context: Context) -> Message:
    """Report what was received, then change every part of it."""
    received = message.content
    text = f"{received['c']['text']} {received['c']['list']} {received['a']['w'].data!r} {sorted(received)}"
    received["c"]["list"].append(CANARY)
    received["c"]["text"] = CANARY
    received["a"]["w"].data = b"evil"
    received["a"]["more"] = Array("float32", (1,), "raw", b"more")
    received["mine"] = ConfigRecord({"x": CANARY})
    return Message(RecordDict({"c": ConfigRecord({"saw": text})}), reply_to=message)


def test_what_a_site_does_to_its_message_reaches_no_other_site(make_grid: MakeGrid) -> None:
    shared = content()
    grid = make_grid(vandal)
    replies = list(grid.pull_messages(send(grid, shared)))
    assert len({reply.content["c"]["saw"] for reply in replies}) == 1
    assert shared == content()


def test_without_the_private_copy_it_would(make_grid: MakeGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "_private_copy", lambda message: message)
    shared = content()
    grid = make_grid(vandal)
    sent, replies = send(grid, shared), list[Message]()
    while len(replies) < 3:  # one pull returns after a slice of work, which a busy machine makes few replies in
        replies += grid.pull_messages(sent)
    first, second, _ = replies
    assert CANARY not in first.content["c"]["saw"]
    assert CANARY in second.content["c"]["saw"]
    assert shared["a"]["w"].data == b"evil"


def test_send_and_receive_waits_for_all_and_stops_at_its_timeout(make_grid: MakeGrid) -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.05)
        return echo(message, context)

    grid = make_grid(slow, nodes=4)

    def messages() -> list[Message]:
        return [grid.create_message(content(), "train", node, "1") for node in grid.get_node_ids()]

    assert len(list(grid.send_and_receive(messages()))) == 4
    assert 1 <= len(list(grid.send_and_receive(messages(), timeout=0.06))) < 4


def test_a_site_keeps_its_own_context_between_messages(make_grid: MakeGrid) -> None:
    def count(message: Message, context: Context) -> Message:
        seen = context.state["seen"]["n"] + 1 if "seen" in context.state else 1
        context.state["seen"] = ConfigRecord({"n": seen})
        return Message(RecordDict({"c": ConfigRecord({"n": seen})}), reply_to=message)

    grid = make_grid(count)
    for expected in (1, 2):
        assert [reply.content["c"]["n"] for reply in grid.pull_messages(send(grid))] == [expected] * 3
