"""A site's lineage: how its first signing key led to the one in force, shown by records of its own journal.

The first record of a journal names the site's first key, and its hash is the site's identity. Each `key-rotated` record
is signed by the key before and carries the next key's signature over it. So these lines alone prove that whoever holds
the last key is the site, whatever else stands in the journal between them. They say nothing of data: the site's name,
its public keys, and when and at which record number a key was replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from fedtune.errors import EnrolmentError, JournalError
from fedtune.journal.chain import Chain, Record
from fedtune.journal.entries import KeyRotated, SiteCreated

MOST_ROTATIONS = 100
_MARK = b'"kind":"key-rotated"'


@dataclass(frozen=True, slots=True)
class Lineage:
    """A site: its identity, its journal's name for it, its keys (the one in force last), and when the others ended."""

    identity: str
    site: str
    keys: tuple[str, ...]
    ends: tuple[str, ...]

    @property
    def key(self) -> str:
        """The key in force."""
        return self.keys[-1]

    @classmethod
    def of(cls, lines: tuple[str, ...]) -> Self:
        """Check the lines of a lineage. Error: `enrolment.bad-lineage`."""
        if not 0 < len(lines) <= MOST_ROTATIONS + 1:
            raise _bad("it has no line, or too many")
        try:
            chain, created = Chain().accept(lines[0].encode())
            keys, ends = [chain.public_key], list[str]()
            for line in lines[1:]:
                chain, rotation = _rotation(line.encode(), keys[-1], chain.site)
                keys.append(chain.public_key)
                ends.append(rotation.time)
        except (JournalError, UnicodeEncodeError) as error:
            raise _bad("a record in it is not as its site has signed it") from error
        if not isinstance(created.entry, SiteCreated) or len(set(keys)) != len(keys):
            raise _bad("a key comes twice, or a record puts none in force")
        return cls(chain.site, created.entry.site, tuple(keys), tuple(ends))

    def extends(self, keys: tuple[str, ...]) -> bool:
        """Whether these are the site's first keys."""
        return self.keys[: len(keys)] == keys


def lineage_lines(journal: Iterable[bytes]) -> tuple[str, ...]:
    """Pick the lines of a lineage from all lines of a journal that was checked."""
    return tuple(
        line.decode()
        for number, line in enumerate(journal)
        if number == 0 or (_MARK in line and json.loads(line)["body"]["kind"] == KeyRotated.kind)
    )


def _rotation(line: bytes, key: str, site: str) -> tuple[Chain, Record]:
    """Check a record where it says that it stands; that the key in force signed it puts the rotations in order."""
    try:
        body = json.loads(line)["body"]
        place, previous = body["sequence"], body["previous"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _bad("a line in it is no record") from error
    if type(place) is not int or not isinstance(previous, str):
        raise _bad("a line in it is no record")
    return Chain(place, previous, "", site, key).accept(line)


def _bad(problem: str) -> EnrolmentError:
    hint = "let the site check its journal: fedtune client journal verify"
    return EnrolmentError("bad-lineage", f"the lineage of a site's key does not hold: {problem}", hint=hint)
