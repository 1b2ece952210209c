"""Privacy units: which records stand or fall together, because one patient or one account owns them.

Works with positions; what names a unit stays in the table and is forgotten once records are grouped. Knows no sampler,
no gradient and no site.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from fedtune.data.labels import label_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedtune.data.table import Table

Indices = NDArray[np.int64]

RECORD = "record"  # the privacy unit that needs no column: each record is a unit of its own


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """A partition of records 0 … n−1 into units 0 … count−1, none of them empty.

    `of_record` (n,) is each record's unit. `by_unit` (n,) lists the records unit by unit, ascending within one, and
    unit u's stand at `starts[u]` … `starts[u + 1]` of it.
    """

    of_record: Indices
    by_unit: Indices
    starts: Indices

    @classmethod
    def each_record(cls, records: int) -> Self:
        """Return the units of so many records, each a unit of its own."""
        return cls.grouped(np.arange(records, dtype=np.int64))

    @classmethod
    def grouped(cls, keys: Sequence[str] | NDArray[np.int64]) -> Self:
        """Return the units that records with equal keys (n,) form, numbered in the keys' order."""
        _, numbers, sizes = np.unique(np.asarray(keys), return_inverse=True, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(numbers.astype(np.int64), np.argsort(numbers, kind="stable").astype(np.int64), starts)

    @property
    def count(self) -> int:
        """The number of units."""
        return len(self.starts) - 1

    @property
    def sizes(self) -> Indices:
        """Records of each unit, (count,)."""
        return np.diff(self.starts)

    @property
    def noun(self) -> str:
        """What a message calls them: records where each is a unit of its own."""
        return "records" if self.count == len(self.of_record) else "units"

    def records(self, unit: int) -> Indices:
        """Return the records of one unit, ascending."""
        return self.by_unit[self.starts[unit] : self.starts[unit + 1]]

    def records_of(self, units: Indices) -> Indices:
        """Return all records of some units, ascending."""
        return np.flatnonzero(np.isin(self.of_record, units)).astype(np.int64)

    def take(self, records: Indices) -> Units:
        """Return the units of some records alone, both numbered anew."""
        return Units.grouped(self.of_record[records])

    def most_frequent(self, labels: Sequence[str]) -> list[str]:
        """Return each unit's most frequent label, the first in alphabetical order of those that are equally so."""
        names, which = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
        pairs, counts = np.unique(np.stack([self.of_record, which]), axis=1, return_counts=True)
        best = np.lexsort((pairs[1], -counts, pairs[0]))
        _, first = np.unique(pairs[0][best], return_index=True)
        return [str(name) for name in names[pairs[1][best][first]]]


def units_of(table: Table, unit: str) -> Units:
    """Group a table's rows by the plan's unit: `record`, or the column that names whose record it is.

    Two cells name one unit when they are the same text, spaces around it aside, in Unicode's composed form; the numbers
    7 and 7.0 are the same too. Merging two units protects both, splitting one does not, so names that look alike are
    one. Raises `data.blank-value` and `data.mixed-types`, with the line and without the cell.
    """
    if unit == RECORD:
        return Units.each_record(table.rows)
    return Units.grouped([unicodedata.normalize("NFC", name) for name in label_names(table, unit)])
