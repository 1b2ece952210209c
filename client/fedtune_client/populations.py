"""The folder `populations/` of a site, and which earlier data sets a new one shares a budget with (ADR 0015).

A file is named by its SHA-256, which stands in the signed journal, so the folder is a copy that may be lost: what is
missing or damaged counts as overlapping every data set. The key of the pseudonyms comes from the vault. Knows no
budget.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fedtune.data.fingerprint import fingerprint
from fedtune.data.population import Population, overlaps, population
from fedtune.data.table import Table
from fedtune.data.units import units_of
from fedtune.errors import DataError
from fedtune.journal.entries import DataRegistered
from fedtune.privacy.plan import public_count
from fedtune_client.vault.files import make_private_folder, read_private, write_private

Registrations = Mapping[int, DataRegistered]  # by their records' numbers in the journal


@dataclass(frozen=True, slots=True)
class Populations:
    """The populations of a site's data sets, each a file that this user alone can read."""

    folder: Path

    def write(self, people: Population) -> str:
        """Keep a population and return its SHA-256; it is on disk when this returns."""
        content = people.to_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        make_private_folder(self.folder)
        write_private(self._path(sha256), [content])
        return sha256

    def read(self, sha256: str) -> Population | None:
        """Return a population, or None where the file is not what the journal says it was.

        Raises `vault.permissions` and `vault.unreadable`: a person can mend these, and a join is for ever.
        """
        content = read_private(self._path(sha256))
        if content is None or hashlib.sha256(content).hexdigest() != sha256:
            return None
        try:
            return Population.from_bytes(content)
        except DataError:  # another version wrote it
            return None

    def lost(self, known: Registrations) -> tuple[int, ...]:
        """Return the registrations whose populations are missing or damaged: a new one will join all of them."""
        return tuple(number for number, entry in sorted(known.items()) if self.read(entry.population) is None)

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.population"


def register(
    store: Populations, table: Table, name: str, unit: str, key: bytes, known: Registrations
) -> DataRegistered:
    """Keep the population of a data set, read with all its columns, and return what the journal is to say of it.

    The population is on disk before the journal can name it. Registering the same again writes the same again.
    Raises what `population` raises for the unit's column, and what the store raises.
    """
    people = population(table, unit, key)
    content = fingerprint(table, table.names)

    @cache
    def may_overlap(sha256: str) -> bool:
        other = store.read(sha256)
        return other is None or overlaps(people, other)

    return DataRegistered(
        name=name,
        fingerprint=content,
        unit=unit,
        units=public_count(units_of(table, unit).count),
        joins=joined(name, content, known, lambda entry: may_overlap(entry.population)),
        population=store.write(people),
    )


def joined(
    name: str, content: str, known: Registrations, may_overlap: Callable[[DataRegistered], bool]
) -> tuple[int, ...]:
    """Return the registrations with which a data set of this name and fingerprint shares its account.

    They have the name, or the content, or are not known to be about other records: whatever is shared is joined.
    """
    return tuple(
        number
        for number, entry in sorted(known.items())
        if entry.name == name or entry.fingerprint == content or may_overlap(entry)
    )
