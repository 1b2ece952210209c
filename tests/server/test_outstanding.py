"""Everybody who was asked is answered for exactly once, whatever is lost on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedtune_server.outstanding import Outstanding

Step = tuple[str, int, float]
steps = st.lists(
    st.tuples(st.sampled_from(["answer", "lose", "wait"]), st.integers(0, 4), st.floats(0.0, 20.0)), max_size=60
)


@given(steps, st.floats(0.0, 30.0))
def test_each_node_ends_once_and_no_lost_one_holds_up_the_others_for_longer_than_it_may(
    steps: list[Step], reconnect: float
) -> None:
    waiting, now, count = Outstanding(reconnect), 0.0, 5
    waiting.asked((f"0-{node}", node) for node in range(count))
    ended: list[int] = []
    first_lost: dict[int, float] = {}
    for number, (what, node, seconds) in enumerate(steps, start=1):
        message = next((m for m, n in waiting.messages.items() if n == node), None)
        if what == "wait":
            now += seconds
            waiting.asked((f"{number}-{n}", n) for n in waiting.due(now))
            over = [n for n, _ in waiting.given_up(now)]
            assert all(now - first_lost[n] >= reconnect for n in over)
            ended += over
        elif message is not None and waiting.answered(message) is not None:
            if what == "answer":
                waiting.done(node)
                ended.append(node)
            else:
                first_lost.setdefault(node, now)
                if not waiting.lost(node, "x.y", now):
                    ended.append(node)
        assert sorted([*ended, *waiting.nodes]) == list(range(count))
        assert len(set(waiting.messages.values())) == len(waiting.messages)  # never two messages to one node


def test_without_patience_a_lost_node_is_given_up_at_once() -> None:
    waiting = Outstanding(0.0)
    waiting.asked([("m", 1)])
    assert waiting.answered("m") == 1
    assert not waiting.lost(1, "flower.error-5", 0.0)
    assert not waiting


def test_a_reply_that_nobody_waits_for_is_nobodys() -> None:
    assert Outstanding(1.0).answered("unknown") is None
