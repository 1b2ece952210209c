"""Which records take part in a step: units drawn, records of them chosen, and a logical batch cut into physical ones.

`PoissonSampler.rate` is the rate the accountant reads, so the sampler that trains is the one that is accounted. Knows
nothing of records' contents; the draws come from a `RandomSource`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import steps_an_epoch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fedtune.data.units import Units
    from fedtune.privacy.accounting import SamplerName
    from fedtune.privacy.random import RandomSource

Indices = NDArray[np.int64]


class Sampler(Protocol):
    """Chooses the units of each step; its name and rate are what the accountant reads."""

    def draws(self, source: RandomSource, steps: int) -> Iterator[Indices]:
        """Yield the drawn units' indices of each step, ascending; possibly none."""


def sampler_of(name: SamplerName, units: int, rate: float) -> Sampler:
    """Return the sampler that a plan names."""
    return PoissonSampler(units, rate) if name == "poisson" else ShuffleSampler(units, rate)


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
                hint="Set training.sampling_rate to the share of a site's units that one step should see.",
            )

    def draw(self, source: RandomSource) -> Indices:
        """Return the drawn units' indices, ascending; possibly none."""
        return np.flatnonzero(source.uniform(self.units) < self.rate).astype(np.int64, copy=False)

    def draws(self, source: RandomSource, steps: int) -> Iterator[Indices]:
        """Yield the draws of each step; random numbers are taken step by step."""
        for _ in range(steps):
            yield self.draw(source)


@dataclass(frozen=True, slots=True)
class ShuffleSampler:
    """In each epoch of 1/`rate` steps, each of `units` is dealt to one step, uniformly and independently of the others.

    Every unit is used once an epoch. A permutation cut into equal batches would do the same for its user, but there one
    more unit moves others from batch to batch; here it changes one batch alone, which is what the accountant counts.
    """

    units: int
    rate: float

    def __post_init__(self) -> None:
        PoissonSampler(self.units, self.rate)  # the same bounds hold
        steps_an_epoch(self.rate)

    def draws(self, source: RandomSource, steps: int) -> Iterator[Indices]:
        """Yield the draws of each step; `steps` are whole epochs, or it is an error."""
        parts = steps_an_epoch(self.rate)
        if steps % parts:
            raise PrivacyError("epoch", f"{steps} steps are not whole epochs of {parts} steps.")
        for _ in range(steps // parts):
            dealt = np.minimum(source.uniform(self.units) * parts, parts - 1).astype(np.int64)
            yield from (np.flatnonzero(dealt == part).astype(np.int64, copy=False) for part in range(parts))


def choose_records(units: Units, drawn: Indices, at_most: int | None, source: RandomSource) -> Indices:
    """Return the records that drawn units bring to one step, unit by unit: all of a unit, or `at_most` of a larger one.

    Those are a uniform sample without replacement, drawn anew each time, so that over the steps all records of a large
    unit are used. What one unit brings depends on that unit and fresh randomness alone: no unit's choice can tell of
    another. Only a unit above the bound costs random numbers (one for each of its records); units that are single
    records cost none.
    """
    if at_most is not None and at_most < 1:
        raise PrivacyError("unit-records", f"a step with {at_most} records of a unit cannot be.")
    if units.count == len(units.of_record):
        return units.by_unit[drawn]
    chosen = [_some(units.records(unit), at_most, source) for unit in drawn]
    return np.concatenate([np.empty(0, np.int64), *chosen])


def _some(records: Indices, at_most: int | None, source: RandomSource) -> Indices:
    if at_most is None or len(records) <= at_most:
        return records
    return np.sort(records[np.argsort(source.uniform(len(records)))[:at_most]])


def physical_batches(
    indices: Indices,
    lengths: Sequence[int] | NDArray[np.integer],
    limit: int,
    tokens: int | None = None,
    units: Units | None = None,
) -> list[Indices]:
    """Cut one logical batch into batches of at most `limit` records and `tokens` tokens that fit in memory together.

    `lengths[i]` is the length of record i of the data set (tokens). A batch's tokens are its records times the longest
    of them, padding included; a record that alone is longer than `tokens` forms a batch of its own. Units are sorted by
    their longest record and records within a unit by length, so that neighbours need little padding, the longest
    first, so that a batch too large for the memory fails at once; ties keep the order of the units and of the indices.
    The records of one unit follow each other, from the end of one batch to the start of the next where it does not fit.
    The result is a partition of `indices` and depends on nothing else; no indices give no batches.
    """
    if limit < 1:
        raise PrivacyError("physical-batch", f"a physical batch of {limit} records cannot be.")
    if tokens is not None and tokens < 1:
        raise PrivacyError("physical-batch", f"a physical batch of {tokens} tokens cannot be.")
    chosen = np.asarray(indices, dtype=np.int64)
    size = np.asarray(lengths, dtype=np.int64)[chosen]
    order = _by_length(size, None if units is None else units.of_record[chosen])
    starts = _starts(size[order], limit, tokens)
    return np.split(chosen[order], starts[1:]) if len(chosen) else []


def _by_length(size: Indices, unit: Indices | None) -> Indices:
    """Order units by their longest record and records within a unit by length, both descending."""
    if unit is None:
        return np.argsort(-size, kind="stable")
    longest = np.zeros(int(unit.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(longest, unit, size)
    return np.lexsort((-size, unit, -longest[unit]))


def _starts(size: Indices, limit: int, tokens: int | None) -> list[int]:
    """Return where each batch begins, filling each before the next."""
    if tokens is None:
        return list(range(0, len(size), limit))
    starts: list[int] = []
    first, longest = 0, 0
    for at, length in enumerate(size.tolist()):
        padded = max(longest, length)
        if not starts or at - first == limit or (at - first + 1) * padded > tokens:
            starts.append(at)
            first, padded = at, length
        longest = padded
    return starts
