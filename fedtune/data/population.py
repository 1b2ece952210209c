"""The population of a data set: keyed pseudonyms by which two data sets are seen to be about the same records.

A fingerprint changes with one row; a privacy budget must not. So a site compares *whose* records and *which* records
two files hold, whatever their names, columns, formats and rows (ADR 0015). Pseudonyms are HMAC-SHA256 (RFC 2104) under
a key of the site, cut to 16 bytes: without the key nobody can test whether a name is among them.

Every column of the file is read, also those that no task uses. Knows no journal, no budget and no file.
"""

from __future__ import annotations

import hmac
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedtune.data.labels import label_names
from fedtune.data.plain import folded, plain_text
from fedtune.data.table import Table
from fedtune.data.units import RECORD
from fedtune.errors import DataError

Pseudonyms = NDArray[np.bytes_]  # (n,) of 16 bytes each, ascending, no two equal

KEY_BYTES = 32
TELLING_LENGTH = 20  # characters from which two equal cells are hardly chance
_SIZE = 16
_TYPE = f"S{_SIZE}"
_MAGIC = b"fedtune population v1\n"
_HEADER = struct.Struct(f"<{len(_MAGIC)}s{_SIZE}s3Q")


class _Cells(NamedTuple):
    """Texts that are not blank and the row of each."""

    rows: list[int]
    texts: list[str]


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Who and what a data set is about.

    `units` are the unit ids of its column (none where each record is a unit), `records` what identifies a record, and
    `repeated` long texts that many rows share, such as class names. `key_id` tells whether two were made by one key.
    """

    key_id: bytes
    units: Pseudonyms
    records: Pseudonyms
    repeated: Pseudonyms

    def to_bytes(self) -> bytes:
        """Return header (context label, key id, three counts) and pseudonyms; `from_bytes` gives the same back."""
        parts = (self.units, self.records, self.repeated)
        return _HEADER.pack(_MAGIC, self.key_id, *map(len, parts)) + b"".join(part.tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> Population:
        """Read what `to_bytes` wrote; `data.damaged-population` for anything else, also of another version."""
        if len(data) < _HEADER.size:
            raise _damaged("it is cut off")
        magic, key_id, *counts = _HEADER.unpack_from(data)
        if magic != _MAGIC or len(data) != _HEADER.size + _SIZE * sum(counts):
            raise _damaged("it has another version or length")
        every = np.frombuffer(data, _TYPE, offset=_HEADER.size)
        units, records, repeated = np.split(every, np.cumsum(counts[:2]))
        if any(np.any(part[:-1] >= part[1:]) for part in (units, records, repeated)):
            raise _damaged("its entries are out of order")
        return cls(key_id, units, records, repeated)


class _Pseudonymiser:
    """Turns texts into pseudonyms under one key; `kind` keeps cells, rows and units of a column apart."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a population's key has {KEY_BYTES} bytes")
        self._key = key
        self.key_id = self._one(b"key")

    def of(self, kind: str, texts: Iterable[str]) -> Pseudonyms:
        """Return the pseudonyms of texts, sorted and each once."""
        prefix = kind.encode("utf-8", "surrogatepass") + b"\0"
        joined = b"".join(self._one(prefix + text.encode("utf-8", "surrogatepass")) for text in texts)
        return np.unique(np.frombuffer(joined, _TYPE))

    def _one(self, message: bytes) -> bytes:
        return hmac.digest(self._key, message, "sha256")[:_SIZE]


def population(table: Table, unit: str, key: bytes) -> Population:
    """Return the population of a table under a site's key of 32 bytes.

    *Units*: with `unit` a column, each unit's id, normalised as `units_of` does, together with the column's name: equal
    ids of columns with different names are different people.

    *Records*: each cell of at least 20 characters (case and runs of white space aside) that is not a time, in a column
    of which at least half the cells are distinct; of a list or a mapping, such as chat messages, each text in it, where
    each position is a column of its own. A row without such a cell is identified as a whole, in whatever order and
    under whatever names its cells stand.

    Reads every column. Raises what `label_names` raises: `data.missing-column`, `data.blank-value`, `data.mixed-types`.
    """
    pseudonyms = _Pseudonymiser(key)
    units = pseudonyms.of("", [])
    if unit != RECORD:
        units = pseudonyms.of(f"unit {folded(plain_text(unit))}", set(map(plain_text, label_names(table, unit))))
    records, repeated = _identities(table, pseudonyms)
    return Population(pseudonyms.key_id, units, records, repeated)


def overlaps(one: Population, other: Population) -> bool:
    """Whether two data sets may be about the same: they share a unit or a record, or it cannot be known.

    A text that one of them repeats counts where it identifies a record of the other, so a file in which each row
    stands thrice is still the same; a text that both repeat does not. Populations under different keys, and one
    without a single identity, overlap with everything.
    """
    if one.key_id != other.key_id or not len(one.records) or not len(other.records):
        return True
    pairs = (
        (one.records, other.records),
        (one.units, other.units),
        (one.records, other.repeated),
        (one.repeated, other.records),
    )
    return any(_share(left, right) for left, right in pairs)


def _identities(table: Table, pseudonyms: _Pseudonymiser) -> tuple[Pseudonyms, Pseudonyms]:
    """Return the pseudonyms of texts that identify a record, and of long ones that do not."""
    records: list[Pseudonyms] = []
    repeated: list[Pseudonyms] = []
    anonymous = np.ones(table.rows, dtype=bool)
    for values in table.columns.values():
        for rows, texts in _by_place(values):
            distinct = set(texts)
            telling = {text for text in distinct if _is_telling(text)}
            identifies = 2 * len(distinct) >= len(texts)
            (records if identifies else repeated).append(pseudonyms.of("cell", telling))
            if identifies:
                anonymous[[row for row, text in zip(rows, texts, strict=True) if text in telling]] = False
    whole = (_whole_row(table, row) for row in np.flatnonzero(anonymous).tolist())
    records.append(pseudonyms.of("row", {row for row in whole if row}))
    found = _union(records)
    return found, np.setdiff1d(_union(repeated), found, assume_unique=True)


def _by_place(values: Sequence[object]) -> Iterable[_Cells]:
    """Return a column's texts for each place within its cells: one place, unless cells are lists or mappings."""
    if not any(isinstance(value, Mapping | list | tuple) for value in values):
        texts = [folded(plain_text(value)) for value in values]
        return [_Cells([row for row, text in enumerate(texts) if text], [text for text in texts if text])]
    places: defaultdict[tuple[object, ...], _Cells] = defaultdict(lambda: _Cells([], []))
    for row, value in enumerate(values):
        for place, text in _texts(value):
            places[place].rows.append(row)
            places[place].texts.append(text)
    return places.values()


def _texts(value: object) -> Iterator[tuple[tuple[object, ...], str]]:
    """Yield each text of a cell that is not blank, with its place in it."""
    waiting: list[tuple[tuple[object, ...], object]] = [((), value)]
    while waiting:
        place, held = waiting.pop()
        if isinstance(held, Mapping):
            waiting.extend(((*place, name), inner) for name, inner in held.items())
        elif isinstance(held, list | tuple):
            waiting.extend(((*place, at), inner) for at, inner in enumerate(held))
        elif text := folded(plain_text(held)):
            yield place, text


def _is_telling(text: str) -> bool:
    return len(text) >= TELLING_LENGTH and not _is_time(text)


def _is_time(text: str) -> bool:
    """Whether a text is a date with a time: two data sets share one by chance."""
    if not text[0].isdigit() or ":" not in text:
        return False
    try:
        datetime.fromisoformat(text.upper())
    except ValueError:
        return False
    return True


def _whole_row(table: Table, row: int) -> str:
    """Return a row's texts, each with its length before it, in alphabetical order; blank for a row without any."""
    texts = sorted(text for values in table.columns.values() for _, text in _texts(values[row]))
    return "".join(f"{len(text)} {text}" for text in texts)


def _union(parts: Iterable[Pseudonyms]) -> Pseudonyms:
    return np.unique(np.concatenate([np.empty(0, _TYPE), *parts]))


def _share(one: Pseudonyms, other: Pseudonyms) -> bool:
    """Whether two ascending sets have a member in common."""
    few, many = sorted((one, other), key=len)
    if not len(few):
        return False
    at = np.searchsorted(many, few)
    return bool(np.any(many[np.minimum(at, len(many) - 1)] == few))


def _damaged(problem: str) -> DataError:
    return DataError(
        "damaged-population",
        f"a population cannot be read: {problem}",
        hint="restore the site's folder populations; until then the data set counts as overlapping every other",
    )
