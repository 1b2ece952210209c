"""How numbers are written: float32, float16, bfloat16, or integers of 8 or 4 bits under a scale for each block.

| format | bytes for P numbers | error of one number x | range |
|---|---|---|---|
| `Float32` | 4·P | none | all of float32 |
| `Float16` | 2·P | < 2⁻¹⁰·abs(x), and < 2⁻²⁴ near zero | ±65,504 |
| `BFloat16` | 2·P | < 2⁻⁷·abs(x), and < 2⁻¹³³ near zero | ±3.39·10³⁸ |
| `Integers(8)` | P + 2·blocks | < its block's scale, ≤ (1 + 2⁻⁷)·max / 127 | all of float32 but the top 2⁻⁷ |
| `Integers(4)` | ⌈P/2⌉ + 2·blocks | < its block's scale, ≤ (1 + 2⁻⁷)·max / 7 | the same |

A block of numbers below 10⁻³⁸ has a scale of up to 2⁻¹³³ more. All but float32 round stochastically, so what is decoded
has the expectation of what was encoded (QSGD, arXiv 1610.02132). A decoder refuses all bytes that are not finite
numbers of the format. Knows vectors and how they are cut, nothing of adapters: `sizes` are the lengths of the tensors
in a vector, and no block spans two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregation.compression import rounding
from fedtune.aggregation.compression.payload import Bytes, refuse
from fedtune.errors import AggregationError
from fedtune.privacy.random import RandomSource

Vector = NDArray[np.float32]
Sizes = Sequence[int]

VALUES: Final = "values"
SCALES: Final = "scales"
LARGEST_FLOAT32: Final = float(np.finfo(np.float32).max)
_NIBBLE: Final = 4
_MOST_BLOCK: Final = 2**20


class Format(Protocol):
    """A way to write a float32 vector as named bytes."""

    def lengths(self, sizes: Sizes) -> dict[str, int]:
        """Return the names and lengths of the arrays, known before anything is read."""

    def encode(self, vector: Vector, sizes: Sizes, source: RandomSource) -> dict[str, Bytes]:
        """Return the bytes; `not-finite` for a number the format cannot hold."""

    def decode(self, arrays: Mapping[str, Bytes], sizes: Sizes) -> Vector:
        """Return the vector, finite; `message.wrong-encoding` for bytes that are no numbers of it."""


@dataclass(frozen=True, slots=True)
class Float32:
    """The numbers as they are, four bytes each."""

    def lengths(self, sizes: Sizes) -> dict[str, int]:
        """Return 4·P bytes of values."""
        return {VALUES: 4 * sum(sizes)}

    def encode(self, vector: Vector, _sizes: Sizes, _source: RandomSource) -> dict[str, Bytes]:
        """Return the numbers, bit for bit."""
        rounding.within(vector, LARGEST_FLOAT32, "float32")
        return {VALUES: _to_bytes(vector, "<f4")}

    def decode(self, arrays: Mapping[str, Bytes], _sizes: Sizes) -> Vector:
        """Return the numbers, bit for bit."""
        return _finite(_from_bytes(arrays[VALUES], "<f4"))


@dataclass(frozen=True, slots=True)
class Float16:
    """IEEE half precision, two bytes each, rounded stochastically."""

    def lengths(self, sizes: Sizes) -> dict[str, int]:
        """Return 2·P bytes of values."""
        return {VALUES: 2 * sum(sizes)}

    def encode(self, vector: Vector, _sizes: Sizes, source: RandomSource) -> dict[str, Bytes]:
        """Return the rounded numbers."""
        return {VALUES: _to_bytes(rounding.to_float16(vector, source), "<f2")}

    def decode(self, arrays: Mapping[str, Bytes], _sizes: Sizes) -> Vector:
        """Return the rounded numbers, exactly."""
        return _finite(_from_bytes(arrays[VALUES], "<f2"))


@dataclass(frozen=True, slots=True)
class BFloat16:
    """The upper half of float32, two bytes each, rounded stochastically."""

    def lengths(self, sizes: Sizes) -> dict[str, int]:
        """Return 2·P bytes of values."""
        return {VALUES: 2 * sum(sizes)}

    def encode(self, vector: Vector, _sizes: Sizes, source: RandomSource) -> dict[str, Bytes]:
        """Return the rounded numbers."""
        return {VALUES: _to_bytes(rounding.to_bfloat16(vector, source), "<u2")}

    def decode(self, arrays: Mapping[str, Bytes], _sizes: Sizes) -> Vector:
        """Return the rounded numbers, exactly."""
        return _finite(rounding.from_bfloat16(_from_bytes(arrays[VALUES], "<u2")))


@dataclass(frozen=True, slots=True)
class Integers:
    """Whole numbers q of 8 or 4 bits, x = q·scale, with one bfloat16 scale for each block of `block` numbers.

    |q| ≤ 2^(bits − 1) − 1, so the grid is symmetric and zero stays zero. The scale is the block's largest magnitude
    over that bound, rounded up, so that nothing is clipped. Two 4-bit numbers share a byte, the first in the lower
    half, each as q + 8. Error: `bad-compression`.
    """

    bits: Literal[8, 4]
    block: int = 128

    def __post_init__(self) -> None:
        if self.bits not in {8, 4} or not 1 <= self.block <= _MOST_BLOCK:
            raise AggregationError(
                "bad-compression",
                f"there is no format of {self.bits} bits in blocks of {self.block}",
                hint=f"use 8 or 4 bits and blocks of 1 to {_MOST_BLOCK}",
            )

    @property
    def largest(self) -> int:
        """The bound on |q|: 127 or 7."""
        return (1 << (self.bits - 1)) - 1

    def lengths(self, sizes: Sizes) -> dict[str, int]:
        """Return ⌈P·bits / 8⌉ bytes of values and two for each block."""
        return {VALUES: -(-sum(sizes) * self.bits // 8), SCALES: 2 * len(self._blocks(sizes))}

    def encode(self, vector: Vector, sizes: Sizes, source: RandomSource) -> dict[str, Bytes]:
        """Return the rounded multiples and their scales."""
        rounding.within(vector, LARGEST_FLOAT32 * (1 - 2.0**-7), f"{self.bits} bits under a bfloat16 scale")
        blocks = self._blocks(sizes)
        starts = np.concatenate([[0], np.cumsum(blocks)[:-1]]).astype(np.intp)
        largest = np.maximum.reduceat(np.abs(vector).astype(np.float64), starts) if vector.size else np.empty(0)
        scales = rounding.bfloat16_above(largest / self.largest)
        steps = np.repeat(rounding.from_bfloat16(scales).astype(np.float64), blocks)
        multiples = np.divide(vector, steps, out=np.zeros(vector.size), where=steps > 0)
        codes = rounding.to_integers(multiples, source)
        return {VALUES: self._pack(codes), SCALES: _to_bytes(scales, "<u2")}

    def decode(self, arrays: Mapping[str, Bytes], sizes: Sizes) -> Vector:
        """Return the multiples times their scales, rounded once to float32."""
        scales = rounding.from_bfloat16(_from_bytes(arrays[SCALES], "<u2"))
        if not np.isfinite(scales).all() or np.signbit(scales).any():
            raise refuse("has a scale that is negative or not finite")
        steps = np.repeat(scales.astype(np.float64), self._blocks(sizes))
        codes = self._unpack(arrays[VALUES], sum(sizes))
        if (np.abs(codes) > self.largest).any() or codes[steps == 0].any():
            raise refuse("has a number outside its scale")
        with np.errstate(over="ignore"):
            return _finite((codes * steps).astype(np.float32))

    def _blocks(self, sizes: Sizes) -> NDArray[np.intp]:
        """Return the lengths of the blocks; a tensor's last one may be shorter."""
        lengths = [min(self.block, size - start) for size in sizes for start in range(0, size, self.block)]
        return np.array(lengths, np.intp)

    def _pack(self, codes: NDArray[np.int64]) -> Bytes:
        if self.bits != _NIBBLE:
            return codes.astype(np.int8).view(np.uint8)
        halves = np.pad(codes + 8, (0, codes.size % 2))
        return (halves[0::2] | halves[1::2] << 4).astype(np.uint8)

    def _unpack(self, packed: Bytes, count: int) -> NDArray[np.int64]:
        if self.bits != _NIBBLE:
            return packed.view(np.int8).astype(np.int64)
        halves = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)
        if halves[count:].any():
            raise refuse("has bits after its last number")
        return halves[:count].astype(np.int64) - 8


def _to_bytes(array: NDArray[Any], dtype: str) -> Bytes:
    return np.frombuffer(np.ascontiguousarray(array, dtype).tobytes(), np.uint8)


def _from_bytes(array: Bytes, dtype: str) -> NDArray[Any]:
    return np.frombuffer(array.tobytes(), dtype)


def _finite(vector: NDArray[Any]) -> Vector:
    wide = vector.astype(np.float32)
    if not np.isfinite(wide).all():
        raise refuse("holds a NaN or an infinity")
    return wide
