"""The weighted mean of the sites' adapter states, as a stream: one state in, nothing kept but a few sums.

Replies arrive in whatever order the network likes, so a plain floating-point sum would make a study's result depend on
which site was quick. Here every term is cut into digits of a fixed grid whose sums float64 holds exactly (the idea of
Demmel and Nguyen, "Parallel Reproducible Summation", 2015, with a grid that is fixed instead of found). Exact addition
has no order: any permutation of the same sites gives the same bits.

Knows no site, no message and no algorithm; what a weight means is `fedtune.aggregation.weights`' business.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from fedtune.model.layout import AdapterLayout, AdapterState, Array

Vector = NDArray[np.float64]

DIGIT_BITS: Final = 32
LOWEST_DIGIT: Final = -3  # bits below 2^-96 are rounded off, term by term, so the order still does not matter
MAX_SITES: Final = 2**20  # a digit is at most 2^32 units, and float64 adds up to 2^53 units exactly
_BLOCK: Final = 2**14  # numbers worked on at once: three blocks of float64 fit a core's cache
_TOO_LARGE: Final = 2.0**900  # beyond it the rounding constants below would overflow
_ROUNDER: Final = 1.5 * 2.0**52  # (x + c·unit) − c·unit rounds x to a multiple of unit


class StreamingMean:
    """Weighted mean Σ wᵢ xᵢ / Σ wᵢ of adapter states, in memory that does not depend on the number of sites.

    Each product wᵢ·xᵢ is rounded once to float64 (and to a multiple of 2^-96), the rounded products are added exactly,
    and only the quotient is rounded to float32: bit-identical for every order of `add`, and before that last rounding
    within a few 2^-53·Σ wᵢ|xᵢ| / Σ wᵢ of the real mean. Memory: one float64 a number and digit in use, at most three
    digits while |wx| < 1. A state that is refused leaves the mean as it was.
    """

    __slots__ = ("_count", "_flat", "_layout", "_part", "_sums", "_terms", "_weight")

    def __init__(self, layout: AdapterLayout) -> None:
        size = layout.size
        self._layout = layout
        self._flat = np.empty(size, np.float32)
        self._terms = np.empty(min(size, _BLOCK))
        self._part = np.empty(min(size, _BLOCK))
        self._sums: dict[int, Vector] = {}
        self._weight = Fraction(0)
        self._count = 0

    @property
    def count(self) -> int:
        """How many states were added."""
        return self._count

    @property
    def weight(self) -> float:
        """The sum of the weights, rounded once."""
        return float(self._weight)

    def add(self, state: AdapterState, weight: float) -> None:
        """Add one site's state, tensors of exactly the layout's names and shapes, with a positive finite weight.

        Errors: `bad-weight`, `wrong-state` (a tensor is missing or has another shape or type), `not-finite`,
        `too-many-sites`.
        """
        self._check(state, weight)
        arrays = [state[spec.name].ravel() for spec in self._layout.tensors]
        np.concatenate(arrays, out=self._flat)
        largest = float(np.abs(self._flat).max(initial=0.0)) * weight
        if not largest < _TOO_LARGE:  # also true of a NaN
            raise AggregationError("not-finite", "a state times its weight is not finite", hint="validate it first")
        for start in range(0, self._flat.size, _BLOCK):
            self._add_block(slice(start, start + _BLOCK), weight, _digit_of(largest))
        self._weight += Fraction(weight)
        self._count += 1

    def result(self) -> dict[str, Array]:
        """Return the mean as float32 arrays of the layout's shapes; `no-site` when nothing was added."""
        if not self._count:
            raise AggregationError("no-site", "there is no site's update to average", hint="see why sites failed")
        mean = (_collapse(self._sums, self._flat.size) / self.weight).astype(np.float32)
        result, start = {}, 0
        for spec in self._layout.tensors:
            result[spec.name] = mean[start : start + spec.size].reshape(spec.shape)
            start += spec.size
        return result

    def _check(self, state: AdapterState, weight: float) -> None:
        """Refuse what would make the sum wrong without a sound."""
        if not (math.isfinite(weight) and weight > 0):
            raise AggregationError("bad-weight", "a site's weight is not positive and finite")
        if self._count >= MAX_SITES:
            raise AggregationError("too-many-sites", f"more than {MAX_SITES} states in one mean")
        for spec in self._layout.tensors:
            array = state.get(spec.name)
            if array is None or array.shape != spec.shape or array.dtype != np.float32:
                raise AggregationError("wrong-state", f"tensor {spec.name} is missing or not float32 {spec.shape}")

    def _add_block(self, block: slice, weight: float, digit: int) -> None:
        """Cut the products of one block into digits, largest first, and add each digit to its sum."""
        flat = self._flat[block]
        rest, part = self._terms[: flat.size], self._part[: flat.size]
        np.multiply(flat, weight, out=rest, dtype=np.float64)
        while True:
            rounder = _ROUNDER * 2.0 ** (DIGIT_BITS * digit)
            np.add(rest, rounder, out=part)
            part -= rounder
            self._sum(digit)[block] += part
            rest -= part
            if digit == LOWEST_DIGIT or not rest.any():
                return
            digit -= 1

    def _sum(self, digit: int) -> Vector:
        """Return the sum of one digit, made when it is first needed."""
        if digit not in self._sums:
            self._sums[digit] = np.zeros(self._flat.size)
        return self._sums[digit]


def _digit_of(largest: float) -> int:
    """Return the digit that holds the leading bit of `largest`: below 2^(32·(digit + 1))."""
    return max(LOWEST_DIGIT, (math.frexp(largest)[1] - 1) // DIGIT_BITS)


def _collapse(sums: dict[int, Vector], size: int) -> Vector:
    """Add the digits up, largest first, carrying the rounding error of each addition (Neumaier)."""
    total, carry = np.zeros(size), np.zeros(size)
    for digit in sorted(sums, reverse=True):
        term = sums[digit]
        rounded = total + term
        kept = rounded - total
        carry += (total - (rounded - kept)) + (term - kept)
        total = rounded
    return total + carry
