"""Checks a journal as a stranger can: without the site's secrets, its lock or its help; nothing is written.

The verdict is the first that holds of
1. `tampered`: a record breaks a rule of the chain (`fedtune.journal.chain`), is signed by no key that the site has put
   in force, or speaks of a record that is not there; or the key asked for is none of the site's;
2. `rolled-back`: a head was witnessed that the journal does not contain: it was put back, or written anew;
3. `torn`: the last record is incomplete, as a kill or a full disk leaves it, or somebody cut it;
4. `intact`.

Without receipts a cut at a record's end, and a history written anew by whoever has the key, are `intact`; a cut
within the last record is `torn`, whoever made it. A site may write while it is read. Memory: some 40 bytes a record.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.errors import JournalError
from fedtune.journal.chain import Chain, Record, is_torn, tampered
from fedtune.journal.entries import HeadWitnessed, KeyRotated
from fedtune.journal.receipts import Comparison, compare, read_receipts, size_of
from fedtune.journal.slim import slim_state
from fedtune.journal.state import SiteState
from fedtune.journal.witness import Head, Receipt

Outcome = Literal["intact", "torn", "tampered", "rolled-back"]
LONGEST = 1 << 24  # bytes of a line; a policy, the longest thing a record says, is far below it
_BAD = {"journal.tampered", "journal.inconsistent"}


@dataclass(frozen=True, slots=True)
class KeyInForce:
    """A key and the first record that it signs."""

    since: int
    public_key: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a journal is worth; all but `outcome`, `reason` and `bad` is about the `records` before the first bad one.

    `site` is the hash of the first record, `torn_bytes` the length of an incomplete last one. `witnessed` is the newest
    record that a receipt names, `unwitnessed` how many come after it; `ignored` receipts are of other witnesses than
    the one asked for. `key_checked` is False where the key was believed because no other was given.
    """

    outcome: Outcome
    reason: str
    records: int
    bad: int | None
    torn_bytes: int
    head: str
    time: str
    site: str
    keys: tuple[KeyInForce, ...]
    key_checked: bool
    witnessed: int | None
    witnesses: tuple[str, ...]
    ignored: int
    state: SiteState

    @property
    def unwitnessed(self) -> int:
        """How many records come after the newest witnessed one."""
        return self.records - (0 if self.witnessed is None else self.witnessed + 1)


def verify(
    path: Path,
    *,
    public_key: str | None = None,
    receipts: Path | None = None,
    witness_key: str | None = None,
    patience: float = 0.0,
) -> Verdict:
    """Read a whole journal and judge it; `patience` (seconds) is how long a record in the making is waited for.

    `public_key` may be any key that the site ever had: each vouches for the one before it. Errors: `journal.missing`,
    `journal.unreadable`, `journal.unknown-entry`; `journal.forged-head` and `journal.other-site` for receipts.
    """
    until = size_of(receipts)  # before the journal is read: a head that is witnessed meanwhile proves nothing
    scan = _Scan()
    scan.read(path, patience)
    scan.require_key(public_key)
    keys = {key.public_key for key in scan.keys}
    try:
        found = compare(read_receipts(receipts, until), witness_key, (scan.chain.site, keys), scan.digests)
    except JournalError:
        if scan.bad is None:
            raise
        found = Comparison(None, (), 0, "")
    outcome, reason = scan.judgement
    if scan.bad is None and found.missing:
        outcome, reason = "rolled-back", found.missing
    chain = scan.chain
    if outcome == "intact" and not chain.length:
        raise JournalError("missing", f"{path} holds no record", hint="name a site's journal: SITE/NAME.journal")
    return Verdict(
        outcome=outcome,
        reason=reason,
        records=chain.length,
        bad=scan.bad,
        torn_bytes=scan.torn_bytes,
        head=chain.digest if chain.length else "",
        time=chain.time,
        site=chain.site,
        keys=tuple(scan.keys),
        key_checked=public_key is not None,
        witnessed=found.witnessed,
        witnesses=found.witnesses,
        ignored=found.ignored,
        state=scan.state,
    )


class _Scan:
    """What one pass over the lines has found."""

    def __init__(self) -> None:
        self.chain, self.state, self.digests = Chain(), slim_state(), bytearray()
        self.keys: list[KeyInForce] = []
        self.judgement: tuple[Outcome, str] = ("intact", "")
        self.bad: int | None = None
        self.torn_bytes = 0

    def read(self, path: Path, patience: float) -> None:
        """Follow the chain to its end or to the first record that does not belong to it."""
        try:
            for line in _lines(path, patience):
                self._line(line)
        except JournalError as error:
            if error.code not in _BAD:
                raise
            self._refuse(self.chain.length, error.message)

    def require_key(self, public_key: str | None) -> None:
        """Believe nothing where the key asked for is not one of the site's."""
        if public_key in {None, *(key.public_key for key in self.keys)} or self.bad is not None or not self.keys:
            return
        signed = self.keys[0].public_key
        self.chain, self.state, self.digests, self.keys = Chain(), slim_state(), bytearray(), []
        self._refuse(0, f"it is signed by {signed[:16]}…, and the key {public_key}, which was asked for, never was its")

    def _line(self, line: bytes) -> None:
        whole = line.endswith(b"\n")
        if len(line) == LONGEST:
            raise tampered(self.chain.length, "it is longer than any record")
        if not whole and is_torn(line, self.chain.length):
            self.torn_bytes = len(line)
            self.judgement = "torn", f"record {self.chain.length} is incomplete: {len(line)} bytes of it are there"
            return
        chain, record = self.chain.accept(line.removesuffix(b"\n"))
        self._require_own_head(record)
        self.state.apply(record)
        if chain.public_key != self.chain.public_key:
            self.keys.append(KeyInForce(chain.length if isinstance(record.entry, KeyRotated) else 0, chain.public_key))
        self.chain = chain
        self.digests += bytes.fromhex(record.digest)
        if not whole:
            self.judgement = "torn", f"record {record.sequence} lacks its line end, which opening the journal adds"

    def _require_own_head(self, record: Record) -> None:
        """Refuse a witnessed head that is not this history's, or that nobody has countersigned."""
        entry = record.entry
        if not isinstance(entry, HeadWitnessed):
            return
        digest = bytes(self.digests[32 * entry.sequence : 32 * entry.sequence + 32])
        if digest.hex() != entry.digest:
            raise tampered(record.sequence, f"it says that another record {entry.sequence} was witnessed")
        key = next(key.public_key for key in reversed(self.keys) if key.since <= entry.sequence + 1)
        head = Head(self.chain.site, entry.sequence, entry.digest, key, entry.head_signature)
        try:
            Receipt(head, entry.witness, entry.signature).check()
        except JournalError as error:
            raise tampered(record.sequence, "the head that it holds was not countersigned") from error

    def _refuse(self, number: int, reason: str) -> None:
        self.bad, self.judgement = number, ("tampered", reason)


def _lines(path: Path, patience: float) -> Iterator[bytes]:
    """Yield lines with their ends; the last may lack it, or be cut at the longest length."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise JournalError("unreadable", f"{path} is no file", hint="name a site's journal: SITE/NAME.journal")
        with path.open("rb") as file:
            while line := file.readline(LONGEST):
                if not line.endswith(b"\n") and len(line) < LONGEST and patience:
                    time.sleep(patience)  # a site that is writing this record finishes it meanwhile
                    line += file.readline(LONGEST - len(line))
                yield line
                if not line.endswith(b"\n"):
                    return
    except FileNotFoundError as error:
        raise JournalError("missing", f"there is no journal {path}", hint="check the path") from error
    except OSError as error:
        raise JournalError("unreadable", f"{path} cannot be read ({error.strerror or error})") from error
