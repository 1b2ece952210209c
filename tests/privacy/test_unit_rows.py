"""Units of several records are clipped as one: against a float64 loop, under attack, and however batches are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.data.sampling import physical_batches
from fedtune.data.units import Units
from fedtune.errors import PrivacyError
from fedtune.privacy.clipping import ClippedSum, clip_and_sum
from fedtune.privacy.units import unit_rows

C, WIDTH = 0.5, 5
WITHIN = C * (1 + 1e-6)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def cut(owners: Any, sizes: list[int]) -> list[Any]:
    """Cut owners in order into batches of these sizes, repeated."""
    batches, at = [], 0
    while at < len(owners):
        size = sizes[len(batches) % len(sizes)]
        batches.append(np.asarray(owners[at : at + size], dtype=np.int64))
        at += size
    return batches


def from_one_buffer(rows: Tensor, batches: list[Any]) -> Iterator[Tensor]:
    """Hand out rows batch by batch from one buffer, as an engine does; what it held before is overwritten with NaN."""
    buffer, at = torch.empty(max(map(len, batches), default=0), rows.shape[1], dtype=rows.dtype), 0
    for batch in batches:
        buffer.fill_(math.nan)
        buffer[: len(batch)] = rows[at : at + len(batch)]
        yield buffer[: len(batch)]
        at += len(batch)


def clipped(rows: Tensor, batches: list[Any], clip_norm: float = C) -> ClippedSum:
    """Sum what units contribute, batch by batch."""
    total = ClippedSum.zero(rows.shape[1], clip_norm)
    for ended in unit_rows(from_one_buffer(rows, batches), batches):
        total += clip_and_sum(ended, clip_norm)
    return total


def loop(rows: Tensor, owners: list[int], clip_norm: float = C) -> list[float]:
    """The same in plain Python floats, one unit after another; a unit that is not finite counts nothing."""
    total = [0.0] * rows.shape[1]
    for owner in sorted(set(owners)):
        own = [rows[at].tolist() for at in range(len(owners)) if owners[at] == owner]
        columns = list(zip(*own, strict=True))
        summed = [math.fsum(column) if all(map(math.isfinite, column)) else math.nan for column in columns]
        norm = math.sqrt(math.fsum(value * value for value in summed))
        if math.isfinite(norm):
            scale = min(1.0, clip_norm / norm) if norm else 1.0
            total = [one + scale * value for one, value in zip(total, summed, strict=True)]
    return total


OWNERS = st.lists(st.integers(0, 6), min_size=1, max_size=24).map(sorted)
CUTS = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@settings(max_examples=150)
@given(owners=OWNERS, sizes=CUTS, seed=st.integers(0, 2**31), scale=st.sampled_from([0.01, 0.3, 30.0]))
def test_clipping_units_equals_a_float64_loop_over_units(
    owners: list[int], sizes: list[int], seed: int, scale: float
) -> None:
    rows = scale * torch.randn(len(owners), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found, units = clipped(rows, cut(owners, sizes)), len(set(owners))
    assert math.dist(found.total, loop(rows, owners)) <= units * C * 5e-6  # the headroom of each unit's scale
    assert (found.records, found.dropped) == (units, 0)
    unclipped = clipped(rows, cut(owners, sizes), 1e6).total
    assert math.dist(unclipped, loop(rows, owners, 1e6)) <= 1e-12 * float(rows.norm())


@settings(max_examples=150)
@given(owners=OWNERS, sizes=CUTS, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_a_units_row_is_the_same_however_the_batches_are_cut(
    owners: list[int], sizes: list[int], dtype: torch.dtype, seed: int
) -> None:
    rows = torch.randn(len(owners), WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole, parts = (
        torch.cat([ended.clone() for ended in unit_rows(from_one_buffer(rows, batches), batches)])
        for batches in (cut(owners, [100]), cut(owners, sizes))
    )
    assert torch.equal(whole, parts)
    assert len(whole) == len(set(owners))


@given(limit=st.integers(1, 9), tokens=st.none() | st.integers(1, 200), seed=st.integers(0, 999))
def test_the_batches_of_the_sampler_give_the_sum_of_one_batch(limit: int, tokens: int | None, seed: int) -> None:
    generator = np.random.default_rng(seed)
    units, lengths = Units.grouped(generator.integers(0, 7, 30)), generator.integers(1, 40, 30)
    gradients = torch.from_numpy(generator.normal(size=(30, WIDTH)))
    drawn = np.flatnonzero(generator.random(30) < 0.7)
    groups = physical_batches(drawn, lengths, limit, tokens, units)
    order = np.concatenate([np.empty(0, np.int64), *groups])
    found = clipped(gradients[order], [units.of_record[group] for group in groups])
    expected = loop(gradients[order], units.of_record[order].tolist()) if len(order) else [0.0] * WIDTH
    assert math.dist(found.total, expected) <= units.count * C * 5e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_units_of_one_record_are_handed_on_untouched(dtype: torch.dtype) -> None:
    rows = torch.randn(6, WIDTH).to(dtype)
    batches = [np.array([4, 0, 2]), np.array([1]), np.array([5, 3])]
    parts = list(rows.split([3, 1, 2]))
    assert [ended.data_ptr() for ended in unit_rows(iter(parts), batches)] == [part.data_ptr() for part in parts]
    mixed = [np.array([4, 0, 2]), np.array([1]), np.array([5, 5])]
    first, second, third = (ended.clone() for ended in unit_rows(iter([part.clone() for part in parts]), mixed))
    assert torch.equal(torch.cat([first, second]), rows[:4])
    assert torch.equal(third[0], (rows[4].double() + rows[5].double()).to(dtype))


def test_no_batch_has_no_row_and_an_empty_one_ends_no_unit() -> None:
    assert list(unit_rows(iter([]), [])) == []
    batches = [np.array([7]), np.array([], dtype=np.int64), np.array([7])]
    assert clipped(torch.full((2, WIDTH), 0.1), batches).total.tolist() == pytest.approx([0.2] * WIDTH)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_record_that_is_not_finite_drops_its_unit_and_no_other(bad: float) -> None:
    rows = torch.full((5, 2), 0.1, dtype=torch.float64)
    rows[3, 1] = bad
    found = clipped(rows, cut([0, 0, 1, 1, 2], [2, 1]))
    assert found.total.tolist() == pytest.approx([0.3, 0.3])
    assert (found.records, found.dropped) == (3, 1)


def test_a_unit_that_comes_back_is_refused_before_anything_is_computed() -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("a gradient was asked for")
        yield torch.empty(0)

    for batches in ([np.array([0, 1, 0])], [np.array([0, 1]), np.array([0])]):
        with pytest.raises(PrivacyError, match="split-unit"):
            next(unit_rows(never(), batches))


def test_rows_without_an_owner_are_refused() -> None:
    with pytest.raises(PrivacyError, match="rows cannot belong"):
        list(unit_rows(iter([torch.zeros(3, WIDTH)]), [np.array([0, 0])]))


# --- attack: what all records of one unit together can do -----------------------------------------------------------

ADVERSARIAL = st.lists(
    st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1e-20, 3e38, -3e38, math.nan]),
    min_size=WIDTH,
    max_size=WIDTH,
)


@settings(max_examples=200)
@given(
    others=st.lists(ADVERSARIAL, max_size=5),
    own=st.lists(ADVERSARIAL, min_size=1, max_size=9),
    first=st.booleans(),
    sizes=CUTS,
    dtype=st.sampled_from(DTYPES),
)
def test_no_unit_moves_the_clipped_sum_by_more_than_the_clip_norm(
    others: list[list[float]], own: list[list[float]], first: bool, sizes: list[int], dtype: torch.dtype
) -> None:
    """Other units have two records each; the attacker's are as many, as large and as broken as it likes."""
    beside = torch.tensor([row for row in others for _ in range(2)], dtype=dtype).reshape(-1, WIDTH)
    owners = [unit for unit in range(1, len(others) + 1) for _ in range(2)]
    mine, unit = torch.tensor(own, dtype=dtype), 0 if first else 99
    rows = torch.cat([mine, beside] if first else [beside, mine])
    all_owners = [unit] * len(own) + owners if first else owners + [unit] * len(own)
    with_unit, without = clipped(rows, cut(all_owners, sizes)), clipped(beside, cut(owners, [3]))
    assert torch.isfinite(with_unit.total).all()
    assert float((with_unit.total - without.total).norm()) <= WITHIN


@pytest.mark.parametrize("records", [1, 2, 8, 64])
def test_a_unit_of_many_records_moves_the_sum_by_the_clip_norm_at_most(records: int) -> None:
    rows = torch.ones(records, WIDTH)
    moved = clipped(rows, cut([0] * records, [5])).total.norm()
    assert float(moved) <= WITHIN


@pytest.mark.parametrize("records", [2, 8, 64])
def test_control_with_records_as_units_it_moves_the_sum_once_for_each_record(records: int) -> None:
    rows = torch.ones(records, WIDTH)
    moved = clipped(rows, cut(range(records), [5])).total.norm()
    assert float(moved) == pytest.approx(records * C, rel=1e-5)
