from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.display import (
    bytes_text,
    change_text,
    epsilon_text,
    metric_text,
    printable,
    seconds_text,
    trend_text,
)


@given(st.floats(0, 1e6))
def test_a_shown_epsilon_is_never_below_the_spent_one(epsilon: float) -> None:
    assert -1e-9 <= float(epsilon_text(epsilon)) - epsilon <= 0.001 + 1e-9


def test_a_target_is_shown_as_it_was_set() -> None:
    shown = [epsilon_text(value) for value in (8, 0.1 + 0.2, 7.99901, None, math.inf)]
    assert shown == ["8.000", "0.300", "8.000", "-", "inf"]


@given(st.text())
def test_foreign_text_cannot_command_a_terminal(text: str) -> None:
    shown = printable(text)
    assert all(char.isprintable() or char == "\n" for char in shown)
    shown.encode("utf-8")


def test_ordinary_text_is_shown_as_it_is() -> None:
    assert printable("Zürich, 東京 ε≤8 \U0001f600") == "Zürich, 東京 ε≤8 \U0001f600"
    assert printable("\x1b[2J\u202e\ud800") == "\\x1b[2J\\u202e\\ud800"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (bytes_text(999), "999 B"),
        (bytes_text(1_234_567), "1.2 MB"),
        (bytes_text(5e15), "5000.0 TB"),
        (seconds_text(8.34), "8.3 s"),
        (seconds_text(59.97), "1m00s"),
        (seconds_text(247), "4m07s"),
        (seconds_text(7500), "2h05m"),
        (metric_text(0.87), "0.8700"),
        (metric_text(None), "-"),
        (change_text(0.5, 0.25), "-0.2500"),
        (change_text(None, 1.0), "-"),
    ],
)
def test_numbers_are_short_and_carry_their_unit(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.lists(st.floats()), st.integers(1, 30))
def test_a_trend_has_a_mark_for_each_of_the_last_values(values: list[float], width: int) -> None:
    assert len(trend_text(values, width)) == min(len(values), width)


def test_a_trend_goes_from_the_lowest_to_the_highest_bar() -> None:
    assert trend_text([1.0, 2.0, math.nan, 3.0]) == "▁▅ █"
    assert trend_text([1.0, 1.0]) == "▅▅"
