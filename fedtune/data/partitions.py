"""Partitions: which rows of one file belong to which simulated site, and which of a site's rows are held out.

Knows row numbers, labels and a seed; neither records nor models. Everything is a pure function of its arguments, so
every machine draws the same.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING

import numpy as np

from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fedtune.config.schema import PartitionSettings

    Rows = NDArray[np.int64]

_TRIES = 200
_MIN_ROWS = 2  # a site needs a record to train on and one to hold out
_MAX_NAME = 64


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """One site's rows, ascending."""

    name: str
    rows: Rows


def partition(
    settings: PartitionSettings,
    *,
    rows: int,
    labels: Sequence[str] | None = None,
    column: Sequence[str] | None = None,
    sites: int,
    seed: int,
) -> tuple[Partition, ...]:
    """Deal rows 0 … rows−1 out to `sites` sites, every row to exactly one.

    - `iid`: a uniform permutation in equal parts (sizes differ by at most 1).
    - `dirichlet`: for each label, p ~ Dirichlet(α·1) over the sites, and the label's shuffled rows are cut in those
      proportions (Hsu, Qi, Brown 2019). Small α gives sites with few labels.
    - `quantity`: sizes in proportions p ~ Dirichlet(α·1) of a uniform permutation; labels are not skewed.
    - `column`: one site for each value of `column`, in the values' order, named after the value.

    The two Dirichlet schemes are redrawn until each site has 2 rows (fewer if there are not that many to deal).
    Raises `data.more-sites-than-records`, `data.empty-site`, `data.no-labels`, `data.no-partition-column`,
    `data.sites-mismatch`.
    """
    if sites > rows:
        raise DataError(
            "more-sites-than-records",
            f"{rows} records cannot be dealt out to {sites} sites",
            hint=f"set federation.sites to {rows} or fewer, or name a larger file with data.path",
        )
    if settings.scheme == "column":
        return _natural_sites(column, sites, settings.column)
    rng = _generator(seed, "partition")
    if settings.scheme == "iid":
        parts = np.array_split(rng.permutation(rows), sites)
    elif settings.scheme == "quantity":
        parts = _redrawn(lambda: _cut(rng.permutation(rows), _shares(rng, settings.alpha, sites)), rows, sites)
    else:
        parts = _redrawn(_label_skew(rng, labels, settings.alpha, sites), rows, sites)
    width = max(3, len(str(sites)))
    return tuple(Partition(f"site-{at:0{width}}", _ascending(part)) for at, part in enumerate(parts, start=1))


def split_holdout(rows: Rows, fraction: float, seed: int, site_name: str) -> tuple[Rows, Rows]:
    """Split a site's rows into (train, held out), both ascending; ⌊fraction · n + ½⌋ are held out, at most n − 1.

    The draw depends on the seed and the site's name only, so a site's split is the same whoever else takes part.
    `fraction` 0 holds nothing out; a single row is always trained on.
    """
    rng = _generator(seed, "holdout", site_name)
    held = max(0, min(int(fraction * len(rows) + 0.5), len(rows) - 1))
    shuffled = rng.permutation(np.sort(rows))
    return _ascending(shuffled[held:]), _ascending(shuffled[:held])


def _generator(seed: int, *stream: str) -> np.random.Generator:
    """Return the generator of a named stream, independent of every other stream of the same seed."""
    digest = hashlib.sha256("\0".join(("fedtune", *stream)).encode()).digest()
    key = tuple(int.from_bytes(digest[at : at + 4], "big") for at in range(0, 16, 4))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _shares(rng: np.random.Generator, alpha: float, sites: int) -> NDArray[np.float64]:
    return rng.dirichlet(np.full(sites, alpha))


def _cut(rows: Rows, shares: NDArray[np.float64]) -> list[Rows]:
    """Cut rows into consecutive parts in proportion to the shares."""
    bounds = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
    return np.split(rows, bounds)


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
        pieces = [_cut(rng.permutation(rows), _shares(rng, alpha, sites)) for rows in of_label]
        return [np.concatenate(site) for site in zip(*pieces, strict=True)]

    return draw


def _redrawn(draw: Callable[[], list[Rows]], rows: int, sites: int) -> list[Rows]:
    """Draw until no site is left (almost) without rows."""
    least = min(_MIN_ROWS, rows // sites)
    for _ in range(_TRIES):
        parts = draw()
        if min(map(len, parts)) >= least:
            return parts
    raise DataError(
        "empty-site",
        f"in {_TRIES} draws of {rows} records over {sites} sites, some site always had fewer than {least}",
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
