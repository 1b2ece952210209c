from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.processes.backoff import Backoff

seconds = st.floats(0, 1e6)


def pauses(backoff: Backoff, stays: list[float]) -> list[float]:
    return list(accumulate(stays, backoff.after, initial=0.0))[1:]


def test_pauses_double_from_one_second_to_a_minute() -> None:
    assert pauses(Backoff(), [0.0] * 9) == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_child_that_stayed_a_minute_begins_anew() -> None:
    assert pauses(Backoff(), [0, 0, 59.9, 60.0, 0]) == [1, 2, 4, 1, 2]


def test_a_child_that_never_stays_is_tried_for_ever() -> None:
    assert pauses(Backoff(), [0.0] * 5000)[-1] == 60


@given(stays=st.lists(seconds, max_size=40), first=st.floats(0.01, 10), longest=st.floats(0.01, 100))
def test_no_pause_is_shorter_than_the_first_or_longer_than_the_longest(
    stays: list[float], first: float, longest: float
) -> None:
    found = pauses(Backoff(first=first, longest=longest), stays)
    assert all(min(first, longest) <= pause <= longest for pause in found)


@pytest.mark.parametrize("pause", [0.0, 1.0, 32.0])
def test_the_same_history_gives_the_same_pause(pause: float) -> None:
    assert Backoff().after(pause, 1.0) == Backoff().after(pause, 1.0)
