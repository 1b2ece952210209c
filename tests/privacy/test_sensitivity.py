"""An attack on the clipped sum: no row, whatever is in it, moves the sum by more than C(1 + 1e-6).

Moves are measured in exact rational arithmetic, so that the judge does not round as the accused does.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedtune.privacy.clipping import ClippedSum, ClippingName, clip_and_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
METHODS: list[ClippingName] = ["fixed", "auto-s", "auto-v"]
CLIP_NORMS = [1e-9, 1e-3, 0.1, 1.0, 37.0, 1e9]


def exact_square(values: Tensor) -> Fraction:
    """‖values‖² without rounding."""
    return sum((Fraction(value) ** 2 for value in values.tolist()), Fraction(0))


def within(clip_norm: float, before: Tensor, after: Tensor) -> bool:
    """Whether ‖after - before‖ ≤ C(1 + 1e-6), exactly."""
    pairs = zip(after.tolist(), before.tolist(), strict=True)
    moved = sum(((Fraction(b) - Fraction(a)) ** 2 for b, a in pairs), Fraction(0))
    return moved <= (Fraction(clip_norm) * (1 + Fraction(1, 10**6))) ** 2


# --- anything -------------------------------------------------------------------------------------------------------

WIDTH = 5
ADVERSARIAL = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1e-23, 1e-20, 1e19, 1e20, 3e38, -3e38, np.nan, np.inf, -np.inf]),
    st.floats(-2, 2, width=32),
)
ROW = st.lists(ADVERSARIAL, min_size=WIDTH, max_size=WIDTH)


@settings(max_examples=300, deadline=None)
@given(
    batch=st.lists(ROW, max_size=6),
    extra=ROW,
    position=st.integers(0, 6),
    clip_norm=st.sampled_from(CLIP_NORMS),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(METHODS),
)
def test_adding_any_row_anywhere_moves_the_sum_by_at_most_the_sensitivity(
    batch: list[list[float]],
    extra: list[float],
    position: int,
    clip_norm: float,
    dtype: torch.dtype,
    method: ClippingName,
) -> None:
    rows = torch.tensor(batch, dtype=dtype).reshape(-1, WIDTH)
    more = torch.tensor([*batch[:position], extra, *batch[position:]], dtype=dtype)
    before, after = clip_and_sum(rows, clip_norm, method), clip_and_sum(more, clip_norm, method)
    assert torch.isfinite(after.total).all()
    assert after.sensitivity == clip_norm
    assert within(clip_norm, before.total, after.total)


# --- wide rows made to mislead a norm or a sum ----------------------------------------------------------------------


def _normal(rng: Any, width: int, clip_norm: float) -> Any:
    return rng.normal(size=width) * clip_norm * 10.0 ** rng.uniform(-6, 6)


def _at_the_clip_norm(rng: Any, width: int, clip_norm: float) -> Any:
    row = rng.normal(size=width)
    return row / np.linalg.norm(row) * clip_norm * (1 + rng.uniform(-5e-6, 5e-6))


def _equal(rng: Any, width: int, clip_norm: float) -> Any:
    return np.full(width, clip_norm * rng.uniform(0.01, 10))


def _spike_over_dust(rng: Any, width: int, clip_norm: float) -> Any:
    """One number beside which the square of each other rounds away, though not those of all together."""
    row = np.full(width, 2.0**-12.6)
    row[rng.integers(width)] = 1.0
    return row * clip_norm * rng.choice([1.0, 3.0])


def _huge(rng: Any, width: int, _clip_norm: float) -> Any:
    return rng.choice([1e18, 2e19, 1e30, 3e38], size=width) * rng.choice([-1, 1], size=width)


def _subnormal(rng: Any, width: int, _clip_norm: float) -> Any:
    return rng.choice([1e-45, 1e-40, 1e-38, 1e-23, 0.0], size=width)


def _not_finite(rng: Any, width: int, clip_norm: float) -> Any:
    row = rng.normal(size=width) * clip_norm
    row[rng.integers(width)] = rng.choice([np.nan, np.inf, -np.inf])
    return row


def _zero(_rng: Any, width: int, _clip_norm: float) -> Any:
    return np.zeros(width)


KINDS: list[Callable[[Any, int, float], Any]] = [
    _normal, _at_the_clip_norm, _equal, _spike_over_dust, _huge, _subnormal, _not_finite, _zero,
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=9),
    repeats=st.sampled_from(["none", "same", "opposite"]),
    width=st.sampled_from([1, 63, 64, 65, 129, 300]),
    clip_norm=st.sampled_from(CLIP_NORMS),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_row_made_to_mislead_moves_it_further(  # noqa: PLR0917 - hypothesis names them
    kinds: list[Callable[..., Any]],
    repeats: str,
    width: int,
    clip_norm: float,
    dtype: torch.dtype,
    method: ClippingName,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    rows = torch.tensor(np.stack([kind(rng, width, clip_norm) for kind in kinds])).to(dtype)
    if repeats != "none":
        rows = torch.cat([rows, rows if repeats == "same" else -rows])
    cut, gone = rng.integers(len(rows) + 1), rng.integers(len(rows))
    whole = clip_and_sum(rows[:cut], clip_norm, method) + clip_and_sum(rows[cut:], clip_norm, method)
    rest = clip_and_sum(torch.cat([rows[:gone], rows[gone + 1 :]]), clip_norm, method)
    assert within(clip_norm, rest.total, whole.total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_no_wide_row_of_dust_contributes_more_than_the_clip_norm(dtype: torch.dtype, method: ClippingName) -> None:
    for spike in (0, 1, 15, 16, 63, 64, 999):
        row = torch.full((1, 5000), 2.0**-12.6, dtype=torch.float64)
        row[0, spike] = 1.0
        assert exact_square(clip_and_sum(row.to(dtype), 0.5, method).total) <= Fraction(1, 4)


def test_control_a_float32_norm_taken_one_by_one_lets_dust_pass() -> None:
    row = np.full(5000, 2.0**-12.6, dtype=np.float32)
    row[0] = 1.0
    naive = np.sqrt(np.cumsum(np.square(row), dtype=np.float32)[-1])  # cumsum adds one by one
    assert exact_square(torch.from_numpy(row).double() / float(naive)) > Fraction(1.0001)


@pytest.mark.parametrize("clip_norm", CLIP_NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_automatic_clipping_of_tiny_rows_never_scales_past_the_clip_norm(dtype: torch.dtype, clip_norm: float) -> None:
    """Their squares underflow, so a plain norm would be too small and the scale too large."""
    rng = np.random.default_rng(0)
    for exponent in range(-320 if dtype == torch.float64 else -45, -5):
        row = torch.tensor(rng.uniform(0.5, 1, size=(1, 70)) * 10.0**exponent).to(dtype)
        contributed = clip_and_sum(row, clip_norm, "auto-v").total
        assert exact_square(contributed) <= Fraction(clip_norm) ** 2
        assert torch.isfinite(contributed).all()


def test_control_the_square_of_a_tiny_row_underflows() -> None:
    row = torch.full((70,), 2e-23)
    assert float(torch.linalg.vector_norm(row)) == 0 < float(torch.linalg.vector_norm(row.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 63, 64, 65, 129, 1001, 70_001])
def test_what_a_row_contributes_does_not_depend_on_the_others_or_its_place(width: int, dtype: torch.dtype) -> None:
    """Else one row more could move what all the others contribute, each by little, together by more than C·1e-6."""
    torch.manual_seed(0)
    row = torch.randn(width).to(dtype)
    alone = clip_and_sum(row[None], 1e-3).total
    for records, place, offset in [(2, 1, 0), (3, 0, 1), (8, 5, 3), (33, 32, 0), (33, 7, 1)]:
        rows = torch.zeros(records, width + offset, dtype=dtype)[:, offset:]
        rows[place] = row
        for laid_out in (rows, rows.contiguous()):
            assert float((clip_and_sum(laid_out, 1e-3).total - alone).norm()) <= 1e-3 * 1e-14


# --- many rows, so that the rounding of the sum matters -------------------------------------------------------------


def worst_move(total: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """By how much the last of many rows moves the sum, at worst; equal rows round in the same direction."""
    numbers = range(len(rows) - 100, len(rows), 3)
    moves = [total(rows[: count + 1]).double() - total(rows[:count]).double() for count in numbers]
    return max(float(torch.linalg.vector_norm(move)) for move in moves)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 1 / 3])
def test_the_sensitivity_holds_in_a_batch_of_a_thousand(value: float, dtype: torch.dtype, method: ClippingName) -> None:
    rows = torch.full((1000, 1000), value, dtype=dtype)
    assert worst_move(lambda part: clip_and_sum(part, 1.0, method).total, rows) <= 1 + 1e-6


def test_the_sensitivity_holds_in_a_batch_in_a_thousand_pieces() -> None:
    rows, total = torch.full((1000, 300), 1 / 3), ClippedSum.zero(300, 1.0)
    for row in rows:
        before, total = total, total + clip_and_sum(row[None], 1.0)
        assert float(torch.linalg.vector_norm(total.total - before.total)) <= 1 + 1e-6


def test_control_a_float32_sum_of_a_thousand_rows_exceeds_the_sensitivity() -> None:
    rows = torch.ones(1000, 3000)
    assert worst_move(lambda part: (part / part.norm(dim=1, keepdim=True)).sum(0), rows) > 1 + 1e-6
