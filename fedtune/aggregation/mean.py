"""The weighted mean of the sites' adapter states, as a stream: one state in, nothing kept but a few sums.

Replies arrive in whatever order the network likes, so a plain floating-point sum would make a study's result depend on
which site was quick. Here every term is rounded to a multiple of a power of two that depends on nothing but the term's
own block of numbers, and the multiples are added as 64-bit integers. Integer addition is exact and has no order: any
permutation of the same sites gives the same bits. (The idea is that of Demmel and Nguyen, "Parallel Reproducible
Summation", 2015: fixed grids instead of a common exponent that all terms would have to agree on.)

A block is at most `BLOCK` numbers of one tensor, so that one large tensor costs the others no precision, and so that
all passes over a block find it in a core's cache.

Knows no site, no message and no algorithm; what a weight means is `fedtune.aggregation.weights`' business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from fedtune.model.layout import AdapterLayout, AdapterState, Array

Vector = NDArray[np.float64]

BLOCK: Final = 2**15
TERM_BITS: Final = 47  # a term is at most 2^47 units of its grid
GRID_STEP: Final = 8  # units are powers of 2^8, so that few of them are ever in use at once
LOWEST_UNIT: Final = -96  # no unit is below 2^-96, whatever the numbers
MAX_SITES: Final = 2**16 - 1  # so many terms of 2^47 units stay below 2^63
_TOO_LARGE: Final = 2.0**900  # beyond it the rounding constants below would overflow
_ROUNDER: Final = 1.5 * 2.0**52  # x + _ROUNDER·unit is a multiple of unit: IEEE 754 rounds it to one


class StreamingMean:
    """Weighted mean Σ wᵢ xᵢ / Σ wᵢ of adapter states, in memory that does not depend on the number of sites.

    Each product wᵢ·xᵢ is rounded to float64, and then by at most 2^-40 of the largest product of its site's block (or
    2^-97, if that is more); what is so rounded is added exactly, and the quotient is rounded to float32. The bits are
    the same for every order of `add`, on every machine with IEEE 754 arithmetic.

    Memory: 8 bytes a number for each grid in use. Each serves largest products within a factor of 2^8, so there is one,
    or two where the sites' lie on both sides of a bound, and never more than eight while |wx| < 1. A state that is
    refused leaves the mean as it was.
    """

    __slots__ = ("_blocks", "_count", "_grids", "_layout", "_terms", "_weight")

    def __init__(self, layout: AdapterLayout) -> None:
        self._layout = layout
        self._blocks = list(_blocks(layout))
        self._terms = np.empty(max((block.stop - block.start for block in self._blocks), default=0))
        self._grids: dict[int, _Grid] = {}
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
        for index, numbers in enumerate(self._cut(state)):
            if not self._enter(index, numbers, weight, 1):
                self._take_back(state, weight, index)
                raise AggregationError("not-finite", "a state times its weight is not finite", hint="validate it first")
        self._weight += Fraction(weight)
        self._count += 1

    def result(self) -> dict[str, Array]:
        """Return the mean as float32 arrays of the layout's shapes; `no-site` when nothing was added."""
        if not self._count:
            raise AggregationError("no-site", "there is no site's update to average", hint="see why sites failed")
        mean = np.empty(self._layout.size, np.float32)
        for index, block in enumerate(self._blocks):
            mean[block] = self._total(index) / self.weight
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

    def _cut(self, state: AdapterState) -> Iterator[Array]:
        """Yield the state's numbers block by block, in the order of `_blocks`."""
        for spec in self._layout.tensors:
            flat = state[spec.name].reshape(-1)
            for start in range(0, flat.size, BLOCK):
                yield flat[start : start + BLOCK]

    def _enter(self, index: int, numbers: Array, weight: float, sign: int) -> bool:
        """Add the products of one block, or with sign −1 take the same products back; False if one is not finite."""
        largest = _largest(numbers) * weight
        if not largest < _TOO_LARGE:  # also true of a NaN
            return False
        if largest:
            terms = self._terms[: numbers.size]
            np.copyto(terms, numbers)
            terms *= weight
            self._grid(_unit_of(largest)).enter(index, self._blocks[index], terms, sign)
        return True

    def _grid(self, unit: int) -> _Grid:
        """Return the sums on one grid, made when it is first needed."""
        if unit not in self._grids:
            self._grids[unit] = _Grid(unit, self._layout.size, len(self._blocks))
        return self._grids[unit]

    def _take_back(self, state: AdapterState, weight: float, count: int) -> None:
        """Subtract the first `count` blocks of a state that was refused after them."""
        for index, numbers in zip(range(count), self._cut(state), strict=False):
            self._enter(index, numbers, weight, -1)

    def _total(self, index: int) -> Vector:
        """Return Σ wᵢ xᵢ of one block, grid after grid, carrying the rounding error of each addition (Neumaier)."""
        block = self._blocks[index]
        total, carry = np.zeros(block.stop - block.start), np.zeros(block.stop - block.start)
        for unit in sorted(self._grids, reverse=True):
            term = self._grids[unit].total(index, block)
            rounded = total + term
            kept = rounded - total
            carry += (total - (rounded - kept)) + (term - kept)
            total = rounded
        return total + carry


class _Grid:
    """Sums of multiples of one unit, 2 to the power `unit`, as 64-bit integers.

    Of a float64 between 2^52 and 2^53 units the bits, read as an integer, count units. Whatever the bits of the rounder
    itself add to that is the same for every term, and goes off again with the number of terms, modulo 2^64. Pages of
    `sums` that no block has touched are not in memory.
    """

    __slots__ = ("_rounder", "_unit", "counts", "sums")

    def __init__(self, unit: int, size: int, blocks: int) -> None:
        self._unit = math.ldexp(1.0, unit)
        self._rounder = np.float64(_ROUNDER * self._unit)
        self.sums = np.zeros(size, np.int64)
        self.counts = [0] * blocks

    def enter(self, index: int, block: slice, terms: Vector, sign: int) -> None:
        """Round one block of terms, in place, and add them, or subtract them."""
        terms += self._rounder
        here = self.sums[block]
        (np.add if sign > 0 else np.subtract)(here, terms.view(np.int64), out=here)
        self.counts[index] += sign

    def total(self, index: int, block: slice) -> Vector:
        """Return one block's sum, rounded once to float64."""
        on_top = self.counts[index] * int(self._rounder.view(np.int64))
        wrapped = (on_top + 2**63) % 2**64 - 2**63
        return np.asarray(self.sums[block] - np.int64(wrapped), np.float64) * self._unit


def _blocks(layout: AdapterLayout) -> Iterator[slice]:
    """Yield where each block lies among all numbers of the layout; no block spans two tensors."""
    first = 0
    for spec in layout.tensors:
        for start in range(first, first + spec.size, BLOCK):
            yield slice(start, min(start + BLOCK, first + spec.size))
        first += spec.size


def _largest(numbers: Array) -> float:
    """Return the largest magnitude; NaN where there is one."""
    return max(float(numbers.max()), -float(numbers.min()))


def _unit_of(largest: float) -> int:
    """Return the exponent of the unit of which `largest`, above zero, is between 2^39 and 2^47, or fewer of 2^-96."""
    above = math.frexp(largest)[1]  # largest < 2^above
    return max(LOWEST_UNIT, -((TERM_BITS - above) // GRID_STEP) * GRID_STEP)
