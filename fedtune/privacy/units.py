"""From rows of records to rows of units: what a unit contributes to a step is the sum of its records' gradients.

Stands between the engine and the clipping, so that a unit is clipped as one. Knows no names of units, only numbers;
nothing of models, sampling or noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.errors import PrivacyError

Numbers = NDArray[np.int64]


def unit_rows(batches: Iterable[Tensor], units: Sequence[Numbers]) -> Iterator[Tensor]:
    """Yield, for each physical batch of one logical batch, the rows (U, P) of the units that end in it.

    `batches` are rows (B, P) of records and `units` the unit (B,) of each row, the records of one unit one after
    another. A unit that does not end with its batch is carried: its partial sum is a copy, so the rows may lie in one
    buffer that every batch overwrites. The sums are written over the rows, and what is yielded is valid until the next
    batch is asked for.

    A unit's row is the float64 sum of its rows in their order, rounded once to the rows' type, so it does not depend on
    where the batches are cut. A NaN or an infinity in one record makes its unit's row so, and clipping drops the unit.
    Units of one record are handed on as they are, and cost nothing.

    ======================================  ==========================================
    unit                                    row
    ======================================  ==========================================
    one record                              its row, bit for bit
    several in one batch                    their sum
    from one batch to the next              their sum, with the batch in which it ends
    no batches, or a batch of no rows       none
    ======================================  ==========================================

    Raises PrivacyError where a unit comes back after another one: clipped in two parts it could contribute 2 C.
    """
    ends = _ends(units)
    alone = all(bool(each.all()) for each in ends)
    carried: Tensor | None = None
    for rows, last in zip(batches, ends, strict=True):
        if len(rows) != len(last):
            raise PrivacyError("units", f"{len(rows)} rows cannot belong to the units of {len(last)} records.")
        if alone:
            yield rows
            continue
        ended = 0
        for row, is_last in zip(rows, last, strict=True):
            carried = row.to(torch.float64, copy=True) if carried is None else carried.add_(row)
            if is_last:
                rows[ended] = carried  # never after the row that was read last
                carried, ended = None, ended + 1
        yield rows[:ended]


def _ends(units: Sequence[Numbers]) -> list[NDArray[np.bool_]]:
    """Say of each record of each batch whether it is the last of its unit; refuse a unit that is not in one piece."""
    order = np.concatenate([np.empty(0, np.int64), *units])
    last = np.diff(order, append=-1) != 0
    if len(np.unique(order)) != last.sum():
        raise PrivacyError(
            "split-unit", "the records of a unit do not follow each other, so it would be clipped twice."
        )
    return np.split(last, np.cumsum([len(own) for own in units])[:-1]) if units else []
