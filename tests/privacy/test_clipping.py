"""The clipped sum: its edge-case table, and an attack with neighbouring batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import PrivacyError
from fedtune.privacy.clipping import ClippedSum, clip_and_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
WIDTH = 5


def norm(result: ClippedSum) -> float:
    return float(torch.linalg.vector_norm(result.total))


def test_a_short_row_is_kept_exactly() -> None:
    row = torch.tensor([[0.3, -0.4, 0.1]])
    result = clip_and_sum(row, 1.0)
    assert torch.equal(result.total, row[0].double())
    assert (result.records, result.clipped, result.dropped) == (1, 0, 0)


def test_a_long_row_keeps_its_direction_and_loses_its_length() -> None:
    result = clip_and_sum(torch.tensor([[30.0, -40.0]]), 2.0)
    assert norm(result) == pytest.approx(2.0, rel=1e-6)
    assert norm(result) <= 2.0
    assert torch.allclose(result.total, torch.tensor([1.2, -1.6], dtype=torch.float64), rtol=1e-6)
    assert result.clipped == 1


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e30), (torch.bfloat16, 1e38), (torch.float64, 1e150)])
def test_a_huge_finite_row_is_scaled_and_not_lost(dtype: torch.dtype, size: float) -> None:
    result = clip_and_sum(torch.full((1, 100), size, dtype=dtype), 1.0)
    assert norm(result) == pytest.approx(1.0, rel=1e-6)
    assert (result.clipped, result.dropped) == (1, 0)


def test_a_float64_row_whose_square_overflows_is_dropped() -> None:
    result = clip_and_sum(torch.tensor([[1e200, 1.0], [0.5, 0.0]], dtype=torch.float64), 1.0)
    assert result.total.tolist() == [0.5, 0.0]
    assert (result.records, result.dropped) == (2, 1)


def test_a_zero_row_contributes_zero_and_is_not_clipped() -> None:
    result = clip_and_sum(torch.zeros(1, 4), 1.0)
    assert norm(result) == 0
    assert (result.records, result.clipped, result.dropped) == (1, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_contributes_zero_and_is_counted(bad: float, dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.5, 0.0], [bad, 1.0], [0.0, 0.25]], dtype=dtype)
    result = clip_and_sum(rows, 1.0)
    assert result.total.tolist() == [0.5, 0.25]
    assert (result.records, result.clipped, result.dropped) == (3, 0, 1)


def test_no_rows_are_a_zero_sum() -> None:
    result = clip_and_sum(torch.zeros(0, 4), 1.0)
    assert result.total.tolist() == [0.0] * 4
    assert result.records == 0
    assert torch.equal(result.total, ClippedSum.zero(4, 1.0).total)


def test_bfloat16_rows_are_summed_without_its_rounding() -> None:
    rows = torch.full((1000, 1), 2.0**-8, dtype=torch.bfloat16)
    assert clip_and_sum(rows, 1.0).total.item() == 1000 * 2.0**-8


def test_a_wide_row_is_clipped_as_one_across_blocks() -> None:
    rows = torch.ones(3, 200_001)
    result = clip_and_sum(rows, 1.0)
    assert norm(result) == pytest.approx(3.0, rel=1e-6)
    assert result.total.std() < 1e-12


def test_physical_batches_add_up_to_the_logical_batch() -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, WIDTH) * torch.logspace(-2, 2, 7)[:, None]
    rows[3, 0] = math.nan
    whole = clip_and_sum(rows, 1.0)
    parts = ClippedSum.zero(WIDTH, 1.0) + clip_and_sum(rows[:3], 1.0) + clip_and_sum(rows[3:], 1.0)
    assert torch.allclose(parts.total, whole.total, rtol=1e-12)
    assert (parts.records, parts.clipped, parts.dropped) == (whole.records, whole.clipped, whole.dropped)


def test_sums_of_different_sensitivity_do_not_add() -> None:
    with pytest.raises(PrivacyError, match="mixed-sums"):
        ClippedSum.zero(3, 1.0) + ClippedSum.zero(3, 2.0)
    with pytest.raises(PrivacyError, match="mixed-sums"):
        ClippedSum.zero(3, 1.0) + ClippedSum.zero(4, 1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf, 1e-20])
def test_an_impossible_clip_norm_is_refused(clip_norm: float) -> None:
    with pytest.raises(PrivacyError, match="clip-norm"):
        clip_and_sum(torch.ones(1, 1), clip_norm)


def test_a_batch_that_is_not_rows_is_refused() -> None:
    with pytest.raises(PrivacyError, match="records, parameters"):
        clip_and_sum(torch.ones(3), 1.0)


ADVERSARIAL = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1e-45, 1e-20, 1e20, 3e38, -3e38, math.nan, math.inf]),
    st.floats(-2, 2, width=32),
)
ROW = st.lists(ADVERSARIAL, min_size=WIDTH, max_size=WIDTH)


@settings(max_examples=300, deadline=None)
@given(
    batch=st.lists(ROW, max_size=6),
    extra=ROW,
    position=st.integers(0, 6),
    clip_norm=st.sampled_from([1e-3, 0.1, 1.0, 37.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_adding_any_row_anywhere_moves_the_sum_by_at_most_the_sensitivity(
    batch: list[list[float]], extra: list[float], position: int, clip_norm: float, dtype: torch.dtype
) -> None:
    rows = torch.tensor(batch, dtype=dtype).reshape(-1, WIDTH)
    more = torch.tensor([*batch[:position], extra, *batch[position:]], dtype=dtype)
    before, after = clip_and_sum(rows, clip_norm), clip_and_sum(more, clip_norm)
    assert torch.isfinite(after.total).all()
    assert torch.linalg.vector_norm(after.total - before.total) <= after.sensitivity * (1 + 1e-6)


def worst_move(total: Any) -> float:
    """By how much the last of many equal rows moves the sum, at worst; equal rows round in the same direction."""
    rows = torch.ones(1000, 3000)
    sums = [total(rows[:count]).double() for count in range(900, 1000, 3)]
    more = [total(rows[: count + 1]).double() for count in range(900, 1000, 3)]
    return max(float(torch.linalg.vector_norm(b - a)) for a, b in zip(sums, more, strict=True))


def test_the_sensitivity_holds_in_a_batch_of_a_thousand() -> None:
    assert worst_move(lambda rows: clip_and_sum(rows, 1.0).total) <= 1 + 1e-6


def test_control_a_float32_sum_of_a_thousand_rows_exceeds_the_sensitivity() -> None:
    assert worst_move(lambda rows: (rows / rows.norm(dim=1, keepdim=True)).sum(0)) > 1 + 1e-6
