"""Partitions: which rows of one file belong to which simulated site, and which of a site's rows are held out.

Whole privacy units are dealt out and held out, so that no patient stands at two sites or on both sides of a split.
Knows row numbers, units, labels and a seed; neither records nor models. Everything is a pure function of its arguments,
so every machine draws the same.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING

import numpy as np

from fedtune.data.units import Units
from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fedtune.config.schema import PartitionSettings

    Rows = NDArray[np.int64]

_TRIES = 200
_MIN_UNITS = 2  # a site needs a unit to train on and one to hold out
_MAX_NAME = 64


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """One site's rows, ascending."""

    name: str
    rows: Rows


def partition(
    settings: PartitionSettings,
    *,
    units: Units,
    labels: Sequence[str] | None = None,
    column: Sequence[str] | None = None,
    sites: int,
    seed: int,
) -> tuple[Partition, ...]:
    """Deal the rows of `units` out to `sites` sites, every row to exactly one; `labels` and `column` are of rows.

    - `iid`: a uniform permutation of the units in equal parts (they differ by at most 1 unit).
    - `dirichlet`: for each label, p ~ Dirichlet(α·1) over the sites, and the label's shuffled units are cut in those
      proportions (Hsu, Qi, Brown 2019). A unit counts for its most frequent label. Small α gives sites with few labels.
    - `quantity`: sizes in proportions p ~ Dirichlet(α·1) of a uniform permutation of units; labels are not skewed.
    - `column`: one site for each value of `column`, in the values' order, named after the value. Here alone one unit
      can come to stand at several sites; `units_at_several_sites` counts them.

    The two Dirichlet schemes are redrawn until each site has 2 units (fewer if there are not that many to deal).
    Raises `data.more-sites-than-records`, `data.empty-site`, `data.no-labels`, `data.no-partition-column`,
    `data.sites-mismatch`.
    """
    if settings.scheme == "column":
        return _natural_sites(column, sites, settings.column)
    if sites > units.count:
        raise DataError(
            "more-sites-than-records",
            f"{units.count} {units.noun} cannot be dealt out to {sites} sites",
            hint=f"set federation.sites to {units.count} or fewer, or name a larger file with data.path",
        )
    rng = _generator(seed, "partition")
    if settings.scheme == "iid":
        parts = np.array_split(rng.permutation(units.count), sites)
    elif settings.scheme == "quantity":
        parts = _redrawn(lambda: _cut(rng.permutation(units.count), _shares(rng, settings.alpha, sites)), units, sites)
    else:
        of_unit = None if labels is None else units.most_frequent(labels)
        parts = _redrawn(_label_skew(rng, of_unit, settings.alpha, sites), units, sites)
    width = max(3, len(str(sites)))
    return tuple(Partition(f"site-{at:0{width}}", units.records_of(part)) for at, part in enumerate(parts, start=1))


def units_at_several_sites(parts: Sequence[Partition], units: Units) -> int:
    """Return how many units have rows at more than one site: each site's promise covers what is there alone."""
    held = np.concatenate([np.unique(units.of_record[part.rows]) for part in parts])
    return int((np.bincount(held, minlength=1) > 1).sum())


def split_holdout(rows: Rows, units: Units, fraction: float, seed: int, site_name: str) -> tuple[Rows, Rows]:
    """Split a site's rows into (train, held out), both ascending, no unit in both.

    ⌊fraction · n + ½⌋ of the site's n units are held out, at most n − 1: 0 holds nothing out, and a single unit is
    always trained on. The draw depends on the seed and the site's name only, so a site's split is the same whoever else
    takes part.
    """
    own = _ascending(rows)
    present = np.unique(units.of_record[own])
    held = max(0, min(int(fraction * len(present) + 0.5), len(present) - 1))
    drawn = _generator(seed, "holdout", site_name).permutation(present)[:held]
    out = np.isin(units.of_record[own], drawn)
    return own[~out], own[out]


def _generator(seed: int, *stream: str) -> np.random.Generator:
    """Return the generator of a named stream, independent of every other stream of the same seed."""
    digest = hashlib.sha256("\0".join(("fedtune", *stream)).encode()).digest()
    key = tuple(int.from_bytes(digest[at : at + 4], "big") for at in range(0, 16, 4))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _shares(rng: np.random.Generator, alpha: float, sites: int) -> NDArray[np.float64]:
    return rng.dirichlet(np.full(sites, alpha))


def _cut(units: Rows, shares: NDArray[np.float64]) -> list[Rows]:
    """Cut units into consecutive parts in proportion to the shares."""
    bounds = np.rint(np.cumsum(shares)[:-1] * len(units)).astype(np.int64)
    return np.split(units, bounds)


def _label_skew(
    rng: np.random.Generator, labels: Sequence[str] | None, alpha: float, sites: int
) -> Callable[[], list[Rows]]:
    """Return a function that draws one partition in which each label has its own shares."""
    if labels is None:
        raise DataError(
            "no-labels",
            "the dirichlet partition skews labels, and this task has none",
            hint="use data.partition.scheme=quantity, iid or column",
        )
    _, which = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    of_label = [np.flatnonzero(which == label) for label in range(which.max() + 1)]

    def draw() -> list[Rows]:
        pieces = [_cut(rng.permutation(units), _shares(rng, alpha, sites)) for units in of_label]
        return [np.concatenate(site) for site in zip(*pieces, strict=True)]

    return draw


def _redrawn(draw: Callable[[], list[Rows]], units: Units, sites: int) -> list[Rows]:
    """Draw until no site is left (almost) without units."""
    least = min(_MIN_UNITS, units.count // sites)
    for _ in range(_TRIES):
        parts = draw()
        if min(map(len, parts)) >= least:
            return parts
    raise DataError(
        "empty-site",
        f"in {_TRIES} draws of {units.count} {units.noun} over {sites} sites, some site always had fewer than {least}",
        hint="raise data.partition.alpha, lower federation.sites, or use data.partition.scheme=iid",
    )


def _natural_sites(values: Sequence[str] | None, sites: int, name: str | None) -> tuple[Partition, ...]:
    if values is None:
        raise DataError(
            "no-partition-column",
            "partition by column needs a column",
            hint="name it: data.partition.column=COLUMN",
        )
    distinct, which = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    if len(distinct) != sites:
        raise DataError(
            "sites-mismatch",
            f"column '{name}' has {len(distinct)} values, and {sites} sites are asked for",
            hint=f"set federation.sites={len(distinct)}, or use another data.partition.scheme",
        )
    names = _site_names([str(value) for value in distinct])
    return tuple(Partition(site, _ascending(np.flatnonzero(which == at))) for at, site in enumerate(names))


def _site_names(values: Sequence[str]) -> list[str]:
    """Return a name for each value: its letters and digits in ASCII, numbered where two values give the same."""
    names: list[str] = []
    for value in values:
        plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
        slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[: _MAX_NAME - 8].rstrip("-") or "site"
        choices = chain([slug], (f"{slug}-{number}" for number in count(2)))
        names.append(next(name for name in choices if name not in names))
    return names


def _ascending(rows: Rows) -> Rows:
    return np.sort(rows).astype(np.int64)
