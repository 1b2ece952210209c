"""The clipped sum: its edge-case table for each method, and how sums join. The attack is in test_sensitivity.py."""

from __future__ import annotations

import math

import pytest
import torch

from fedtune.errors import PrivacyError
from fedtune.privacy.clipping import HEADROOM, PIECE, ClippedSum, ClippingName, clip_and_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
METHODS: list[ClippingName] = ["fixed", "auto-s", "auto-v"]
AUTOMATIC: list[ClippingName] = ["auto-s", "auto-v"]
WIDTH = 5


def norm(result: ClippedSum) -> float:
    return float(torch.linalg.vector_norm(result.total))


def about(value: float) -> float:
    """Approximate as clipping promises: norms are right to 2e-6, and rows are scaled to 2e-6 below C."""
    return pytest.approx(value, rel=4.1e-6)  # type: ignore[return-value]


def counts(result: ClippedSum) -> tuple[int, int, int]:
    return result.records, result.clipped, result.dropped


# --- fixed ----------------------------------------------------------------------------------------------------------


def test_a_short_row_is_kept_exactly() -> None:
    row = torch.tensor([[0.3, -0.4, 0.1]])
    result = clip_and_sum(row, 1.0)
    assert torch.equal(result.total, row[0].double())
    assert counts(result) == (1, 0, 0)


def test_a_long_row_keeps_its_direction_and_loses_its_length() -> None:
    result = clip_and_sum(torch.tensor([[30.0, -40.0]]), 2.0)
    assert norm(result) == about(2.0)
    assert norm(result) <= 2.0
    assert torch.allclose(result.total, torch.tensor([1.2, -1.6], dtype=torch.float64), rtol=4.1e-6)
    assert result.clipped == 1


@pytest.mark.parametrize("wide", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 200_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_row_is_clipped_as_one_across_pieces_and_blocks(wide: int, dtype: torch.dtype) -> None:
    result = clip_and_sum(torch.full((3, wide), 2.0, dtype=dtype), 1.0)
    assert norm(result) == about(3.0)
    assert torch.unique(result.total).numel() == 1


def test_rows_may_be_a_part_of_a_larger_buffer() -> None:
    torch.manual_seed(0)
    buffer = torch.randn(9, 400)
    inner = buffer[2:6, 3:303]
    assert torch.equal(clip_and_sum(inner, 1.0).total, clip_and_sum(inner.contiguous(), 1.0).total)


# --- automatic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e38, 1e19, 1.0, 1e-3, 1e-12, 1e-20, 1e-38, 1e-40])
def test_auto_v_brings_every_row_to_the_clip_norm(size: float, dtype: torch.dtype) -> None:
    row = torch.tensor([[3.0, 0.0, -4.0]], dtype=torch.float64).mul_(size / 2).to(dtype)
    assert norm(clip_and_sum(row, 0.7, "auto-v")) == about(0.7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1e19, 30.0, 1.0, 0.01, 1e-4, 1e-12])
def test_auto_s_adds_a_hundredth_to_the_norm_whatever_the_clip_norm(length: float, dtype: torch.dtype) -> None:
    """Bu et al., arXiv 2206.07136: R / (‖g‖ + γ) with γ = 0.01, in the units of the gradient."""
    row = torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64).mul_(length).to(dtype)
    for clip_norm in (0.1, 1.0, 8.0):
        result = clip_and_sum(row, clip_norm, "auto-s")
        assert norm(result) == about(clip_norm * length / (length + 0.01))
        assert norm(result) < clip_norm


@pytest.mark.parametrize("method", AUTOMATIC)
def test_under_automatic_clipping_the_clip_norm_only_scales_the_sum(method: ClippingName) -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 300) * torch.logspace(-6, 6, 7)[:, None]
    one, four = clip_and_sum(rows, 0.5, method).total, clip_and_sum(rows, 2.0, method).total
    assert torch.allclose(4 * one, four, rtol=1e-12)


def test_clipped_counts_the_rows_that_are_scaled_down() -> None:
    rows = torch.tensor([[5.0], [0.995], [0.5], [0.0]])
    assert [clip_and_sum(rows, 1.0, method).clipped for method in METHODS] == [1, 2, 1]


def test_a_float64_row_too_short_to_be_scaled_up_contributes_less() -> None:
    result = clip_and_sum(torch.full((1, 4), 1e-300, dtype=torch.float64), 1.0, "auto-v")
    assert norm(result) == pytest.approx(2e-10)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(PrivacyError, match="clipping-method"):
        clip_and_sum(torch.ones(1, 1), 1.0, "adaptive")  # type: ignore[arg-type]


# --- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 1e30), (torch.bfloat16, 1e38), (torch.float16, 6e4), (torch.float64, 1e200)],
)
def test_a_huge_finite_row_is_scaled_and_not_lost(dtype: torch.dtype, size: float, method: ClippingName) -> None:
    result = clip_and_sum(torch.full((1, 100), size, dtype=dtype), 1.0, method)
    assert norm(result) == about(1.0)
    assert counts(result) == (1, 1, 0)


@pytest.mark.parametrize("method", METHODS)
def test_a_float64_row_whose_norm_overflows_is_dropped(method: ClippingName) -> None:
    result = clip_and_sum(torch.tensor([[1.7e308, 1.7e308], [0.0, 0.0]], dtype=torch.float64), 1.0, method)
    assert result.total.tolist() == [0.0, 0.0]
    assert counts(result) == (2, 0, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_row_contributes_zero_and_is_not_clipped(dtype: torch.dtype, method: ClippingName) -> None:
    rows = torch.tensor([[0.0, 0.0], [-0.0, 0.0]], dtype=dtype)
    result = clip_and_sum(rows, 1.0, method)
    assert norm(result) == 0
    assert counts(result) == (2, 0, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_contributes_zero_and_is_counted(
    bad: float, dtype: torch.dtype, method: ClippingName
) -> None:
    good = torch.tensor([[0.5, 0.0], [0.0, 0.25]], dtype=dtype)
    rows = torch.stack([good[0], torch.tensor([bad, 1.0], dtype=dtype), good[1]])
    result, clean = clip_and_sum(rows, 1.0, method), clip_and_sum(good, 1.0, method)
    assert torch.equal(result.total, clean.total)
    assert counts(result) == (3, clean.clipped, 1)


@pytest.mark.parametrize("method", METHODS)
def test_no_rows_are_a_zero_sum(method: ClippingName) -> None:
    result = clip_and_sum(torch.zeros(0, 4), 1.0, method)
    assert result.total.tolist() == [0.0] * 4
    assert counts(result) == (0, 0, 0)
    assert torch.equal(result.total, ClippedSum.zero(4, 1.0).total)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_nothing_but_bad_ones_are_a_zero_sum(method: ClippingName) -> None:
    result = clip_and_sum(torch.full((3, 4), math.nan), 1.0, method)
    assert result.total.tolist() == [0.0] * 4
    assert counts(result) == (3, 0, 3)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_read_and_never_written(method: ClippingName) -> None:
    rows = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [1e30, 1e30], [0.0, 0.0]])
    before = rows.clone()
    clip_and_sum(rows, 1.0, method)
    assert torch.equal(rows.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


def test_bfloat16_rows_are_summed_without_its_rounding() -> None:
    rows = torch.full((1000, 1), 2.0**-8, dtype=torch.bfloat16)
    assert clip_and_sum(rows, 1.0).total.item() == 1000 * 2.0**-8


# --- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_physical_batches_add_up_to_the_logical_batch(method: ClippingName) -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, WIDTH) * torch.logspace(-2, 2, 7)[:, None]
    rows[3, 0] = math.nan
    whole = clip_and_sum(rows, 1.0, method)
    pieces = [clip_and_sum(rows[:3], 1.0, method), clip_and_sum(rows[3:], 1.0, method)]
    parts = ClippedSum.zero(WIDTH, 1.0) + pieces[0] + pieces[1]
    assert torch.allclose(parts.total, whole.total, rtol=1e-12)
    assert counts(parts) == counts(whole)


def test_an_empty_sum_adds_nothing_and_copies_nothing() -> None:
    some, empty = clip_and_sum(torch.ones(2, WIDTH), 1.0), ClippedSum.zero(WIDTH, 1.0)
    assert (empty + some).total is some.total
    assert (some + empty).total is some.total


def test_adding_leaves_both_sums_as_they_were() -> None:
    one, two = (clip_and_sum(torch.full((1, WIDTH), value), 10.0) for value in (1.0, 2.0))
    assert (one + two).total.tolist() == [3.0] * WIDTH
    assert (one.total.tolist(), two.total.tolist()) == ([1.0] * WIDTH, [2.0] * WIDTH)


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


def test_the_headroom_covers_every_order_of_adding_up_a_piece() -> None:
    """n additions and roundings of positive numbers err by a factor within 1 ± n·u/(1 - n·u), u = 2⁻²⁴ (Higham)."""
    unit = 2.0**-24
    squares = PIECE * unit / (1 - PIECE * unit)
    assert 1 - math.sqrt(1 - squares) * (1 - unit) < HEADROOM
