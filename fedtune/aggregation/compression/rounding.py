"""Stochastic rounding: to one of the two neighbours on a grid, so that the expectation is the number itself.

    x between neighbours a ≤ x ≤ b:  b with probability (x − a) / (b − a), else a;  E = x, variance (x − a)·(b − x)

The probability is exact for bfloat16 and within 2⁻⁵² otherwise. A number on the grid stays what it is. Deterministic
given the source's stream. Knows no adapter and no byte.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import AggregationError
from fedtune.privacy.random import RandomSource

Vector = NDArray[np.float32]

LARGEST_FLOAT16: Final = 65504.0
LARGEST_BFLOAT16: Final = float(np.uint32(0x7F7F0000).view(np.float32))
_LOW_BITS: Final = 16


def to_integers(values: NDArray[np.float64], source: RandomSource) -> NDArray[np.int64]:
    """Round to whole numbers."""
    below = np.floor(values)
    # The fraction is exact; floor(x + u) would round 127 + u up to 128 for u next to 1.
    up = source.uniform(values.size) < values - below
    return (below + up).astype(np.int64)


def to_float16(values: Vector, source: RandomSource) -> NDArray[np.float16]:
    """Round to float16, subnormals included. Error: `not-finite` beyond ±65,504, which would become an infinity."""
    within(values, LARGEST_FLOAT16, "float16")
    near = values.astype(np.float16)
    wide = near.astype(np.float32)
    with np.errstate(over="ignore"):  # the neighbour above 65,504 is made and never chosen
        below = np.where(wide > values, np.nextafter(near, np.float16(-np.inf)), near)
        above = np.where(wide < values, np.nextafter(near, np.float16(np.inf)), near)
    gap = above.astype(np.float64) - below
    part = np.divide(values.astype(np.float64) - below, gap, out=np.zeros(values.size), where=gap > 0)
    return np.where(source.uniform(values.size) < part, above, below)


def to_bfloat16(values: Vector, source: RandomSource) -> NDArray[np.uint16]:
    """Round to the upper 16 bits of float32. Error: `not-finite` beyond ±3.39·10³⁸.

    Sixteen random bits are added below the cut; the carry rounds the magnitude up with the probability that the bits
    cut off say, exactly.
    """
    within(values, LARGEST_BFLOAT16, "bfloat16")
    random = (source.uniform(values.size) * 2.0**_LOW_BITS).astype(np.uint32)
    return ((values.view(np.uint32) + random) >> _LOW_BITS).astype(np.uint16)


def bfloat16_above(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Return the smallest bfloat16 not below each value ≥ 0: a scale that nothing exceeds, zero for zero alone."""
    narrow = values.astype(np.float32)
    narrow = np.where(narrow < values, np.nextafter(narrow, np.float32(np.inf)), narrow)
    return ((narrow.view(np.uint32) + np.uint32(0xFFFF)) >> _LOW_BITS).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Vector:
    """Widen to float32, exactly."""
    return (bits.astype(np.uint32) << _LOW_BITS).view(np.float32)


def within(values: NDArray[np.floating[Any]], largest: float, name: str) -> None:
    """Raise `not-finite` for a NaN, an infinity, or a number that the format would turn into one."""
    if not np.abs(values).max(initial=0.0) <= largest:  # also true of a NaN
        raise AggregationError(
            "not-finite",
            f"an update holds a number that {name} cannot",
            hint="use another compression, or find out why the update is so large",
        )
