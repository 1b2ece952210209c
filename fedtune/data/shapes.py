"""Physical batches whose shape tells nothing of the other records.

A computer rounds the same record's gradient otherwise in a batch of another shape. Where batches are as long as their
longest record, one record more or less therefore changes all others a little, and clipping does not bound that. Here a
record's batch is as long as a public table says of its own unit, and always of as many rows: places without a record
hold a filler, whose gradient is thrown away. Knows no model; see ADR 0014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fedtune.data.units import Units

    Indices = NDArray[np.int64]

SHARE = 16  # a batch holds up to this share of an expected logical batch, so that the last one of a width wastes little
FEWEST = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """The rows of a physical batch, one filler at least among them, and the tokens of each."""

    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ShapeRule:
    """What decides all shapes: public numbers of the plan, and of a record its own unit's length alone.

    `expected` is the expected logical batch in records, `records` and `tokens` bound a physical batch (fillers
    included in the tokens), `longest` is the plan's longest example.
    """

    expected: float
    records: int
    tokens: int | None
    longest: int

    def shape(self, length: int) -> Shape:
        """Return the shape of the batches that hold records of this length.

        At least one row is a filler, which is padded: in a batch without any padding, models attend by another kernel.
        """
        width = width_of(length, self.longest)
        records = 2 ** int(np.log2(max(FEWEST, self.expected / SHARE)))
        bound = self.records if self.tokens is None else min(self.records, self.tokens // width - 1)
        return Shape(max(1, min(records, bound)) + 1, width)


def width_of(length: int, longest: int) -> int:
    """Return the padded length of a record: 8, 16, 24, 32, then in steps of a half (48, 64, 96, …), at most `longest`.

    Under a third of a long record's tokens are padding. A record of the full length has none.
    """
    width = 8 * -(-max(1, length) // 8)
    if width > 32:  # noqa: PLR2004 - named in the docstring
        power = 2 ** int(np.ceil(np.log2(width)))
        width = power * 3 // 4 if width <= power * 3 // 4 else power
    return max(length, min(width, longest))


def shaped_batches(
    records: Indices, lengths: Sequence[int] | NDArray[np.integer], rule: ShapeRule, units: Units
) -> list[tuple[Indices, Shape]]:
    """Cut one logical batch into records and the shape of their batch, the longest first; none for no records.

    All records of a unit are padded alike, to its longest, and follow each other.
    """
    size, unit = np.asarray(lengths, dtype=np.int64)[records], units.of_record[records]
    longest = np.zeros(int(unit.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(longest, unit, size)
    shapes = [rule.shape(int(length)) for length in longest[unit]]
    widths = np.array([shape.tokens for shape in shapes], dtype=np.int64)
    order = np.lexsort((unit, -widths))
    batches: list[tuple[Indices, Shape]] = []
    for width in sorted(set(widths.tolist()), reverse=True):
        alike = order[widths[order] == width]
        shape = shapes[alike[0]]
        starts = range(0, len(alike), shape.rows - 1)
        batches += [(records[alike[start : start + shape.rows - 1]], shape) for start in starts]
    return batches
