"""Fixed shapes: what a record's batch looks like depends on its own unit and on public numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.batches import collate, filled
from fedtune.data.shapes import Shape, ShapeRule, shaped_batches, width_of
from fedtune.data.templates import IGNORED, Example
from fedtune.data.units import Units

RULES = st.builds(
    ShapeRule,
    expected=st.floats(0.1, 5000),
    records=st.integers(1, 200),
    tokens=st.none() | st.integers(1, 4000),
    longest=st.just(300),
)
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def cut(lengths: list[int], drawn: list[int], rule: ShapeRule, keys: list[str] | None = None) -> Any:
    units = Units.each_record(len(lengths)) if keys is None else Units.grouped(keys)
    return shaped_batches(np.array(drawn, dtype=np.int64), lengths, rule, units)


@given(LENGTHS, RULES, st.data())
def test_a_records_shape_does_not_depend_on_the_other_records(lengths: list[int], rule: ShapeRule, data: Any) -> None:
    drawn = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1).map(sorted))
    record = data.draw(st.sampled_from(drawn))
    seen = [shape for group, shape in cut(lengths, drawn, rule) if record in group]
    alone = [shape for _, shape in cut(lengths, [record], rule)]
    assert seen == alone


@given(LENGTHS, RULES)
def test_every_record_is_in_one_batch_that_holds_it_and_a_filler(lengths: list[int], rule: ShapeRule) -> None:
    batches = cut(lengths, list(range(len(lengths))), rule)
    together = np.concatenate([group for group, _ in batches])
    assert sorted(together.tolist()) == list(range(len(lengths)))
    for group, shape in batches:
        assert 1 <= len(group) < shape.rows <= rule.records + 1
        assert max(lengths[at] for at in group) <= shape.tokens <= rule.longest
        if rule.tokens is not None and shape.rows > 2:
            assert shape.rows * shape.tokens <= rule.tokens


@given(st.integers(1, 5000))
def test_little_of_a_long_record_is_padding(length: int) -> None:
    width = width_of(length, 10_000)
    assert length <= width
    assert width == 8 * -(-length // 8) or width <= 1.5 * length
    assert width_of(length, length) == length


def test_widths_grow_with_the_length() -> None:
    widths = [width_of(length, 10_000) for length in range(1, 400)]
    assert widths == sorted(widths)
    assert sorted(set(widths)) == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


def test_a_units_records_are_padded_alike_and_follow_each_other() -> None:
    lengths, keys = [3, 90, 5, 6, 20, 7], ["a", "b", "a", "b", "c", "a"]
    batches = cut(lengths, [0, 1, 2, 3, 4, 5], ShapeRule(8.0, 8, None, 128), keys)
    assert [(sorted(group.tolist()), shape.tokens) for group, shape in batches] == [
        ([1, 3], 96),
        ([4], 24),
        ([0, 2, 5], 8),
    ]


def test_no_records_give_no_batches() -> None:
    assert cut([4, 5], [], ShapeRule(8.0, 8, None, 128)) == []


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_fillers_are_one_token_without_a_label_below_the_records(kind: Any) -> None:
    labels = np.array([7, 8], dtype=np.int32) if kind == "causal-lm" else None
    example = Example(np.array([7, 8], dtype=np.int32), 2, target=None if labels is not None else 2, labels=labels)
    batch = filled(collate([example, example], 0, kind), Shape(4, 5), 9)
    assert (batch.records, batch.rows, batch.fillers) == (2, 4, 2)
    assert batch.input_ids.tolist()[:1] == [[7, 8, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1, 0, 0, 0, 0]] * 2
    if kind == "causal-lm":
        assert batch.labels.tolist() == [[7, 8, *[IGNORED] * 3]] * 2 + [[IGNORED] * 5] * 2
    else:
        assert batch.labels.tolist() == [2, 2, 0, 0]
    assert batch.to(torch.device("cpu")).fillers == 2
