"""Sorted positions in few bits: the code of Elias and Fano, whose length depends on nothing but how many there are.

k of P positions, ascending. The lower ℓ = ⌊log₂(P / k)⌋ bits of each are written as they are; the rest of the j-th,
hⱼ, as a one at place hⱼ + j of a bit string. About 2 + log₂(P / k) bits a position, where a 32-bit index takes 32; for
a few of many that is within 0.6 bits of what any code needs. All bits in the order of their bytes, the lowest bit of a
byte first.

Sources: Elias (Journal of the ACM 21, 1974), Fano (MIT, Project MAC Memorandum 61, 1971).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregation.compression.payload import Bytes, refuse

Positions = NDArray[np.int64]


def encoded_length(count: int, size: int) -> int:
    """Return the bytes of `count` ≥ 1 positions below `size`."""
    low, high = _bits(count, size)
    return -(-(count * low + high) // 8)


def encode(positions: Positions, size: int) -> Bytes:
    """Return the code of strictly ascending positions below `size`, at least one."""
    count = len(positions)
    low, high = _bits(count, size)
    bits = np.zeros(count * low + high, np.uint8)
    bits[: count * low] = (positions[:, None] >> np.arange(low) & 1).reshape(-1)
    bits[count * low + (positions >> low) + np.arange(count)] = 1
    return np.packbits(bits, bitorder="little")


def decode(code: Bytes, count: int, size: int) -> Positions:
    """Return the positions, ascending, unique and below `size`; `message.wrong-encoding` for any other bytes.

    `code` has `encoded_length(count, size)` bytes.
    """
    low, high = _bits(count, size)
    bits = np.unpackbits(code, bitorder="little")
    ones = np.flatnonzero(bits[count * low : count * low + high])
    if len(ones) != count or bits[count * low + high :].any():
        raise refuse("has another number of positions than the plan says")
    lower = bits[: count * low].reshape(count, low).astype(np.int64) @ (1 << np.arange(low))
    positions: Positions = ((ones - np.arange(count)) << low) | lower
    if positions[-1] >= size or (np.diff(positions) <= 0).any():
        raise refuse("has positions that are not ascending, or beyond the adapter")
    return positions


def _bits(count: int, size: int) -> tuple[int, int]:
    """Return ℓ and the length of the bit string of the upper parts."""
    low = (size // count).bit_length() - 1
    return low, count + ((size - 1) >> low)
