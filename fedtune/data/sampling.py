"""Which units take part in a step, and how a logical batch is cut into physical ones.

`PoissonSampler.rate` is the rate the accountant reads, so the sampler that trains is the one that is accounted. Knows
nothing of records' contents; the draws come from a `RandomSource`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedtune.privacy.random import RandomSource

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PoissonSampler:
    """Each of `units` is drawn independently with probability `rate`.

    The size of a draw is Binomial(units, rate): it varies, may be 0, and is itself private, so nothing is divided by
    it. At rate 1 every unit is drawn. Shuffling and fixed-size batches are *not* Poisson and have other guarantees.
    """

    units: int
    rate: float

    def __post_init__(self) -> None:
        if self.units < 0:
            raise PrivacyError("units", f"a sampler over {self.units} units cannot be.")
        if not 0 < self.rate <= 1:
            raise PrivacyError(
                "sampling-rate",
                f"the sampling rate is {self.rate}; it is a probability above 0 and at most 1.",
                hint="Set training.sampling_rate to the share of a site's records that one step should see.",
            )

    def draw(self, source: RandomSource) -> Indices:
        """Return the drawn units' indices, ascending; possibly none."""
        return np.flatnonzero(source.uniform(self.units) < self.rate).astype(np.int64, copy=False)


def physical_batches(indices: Indices, lengths: Sequence[int] | NDArray[np.integer], limit: int) -> list[Indices]:
    """Cut one logical batch into batches of at most `limit` records that fit in memory together.

    `lengths[i]` is the length of record i of the data set (tokens). Records are sorted by length, so that neighbours
    need little padding, the longest first, so that a batch too large for the memory fails at once; ties keep the order
    of the indices. The result is a partition of `indices` and depends on nothing else; no indices give no batches.
    """
    if limit < 1:
        raise PrivacyError("physical-batch", f"a physical batch of {limit} records cannot be.")
    chosen = np.asarray(indices, dtype=np.int64)
    order = chosen[np.argsort(-np.asarray(lengths, dtype=np.int64)[chosen], kind="stable")]
    return [order[start : start + limit] for start in range(0, len(order), limit)]
