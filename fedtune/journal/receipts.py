"""A file of receipts (one JSON object a line), and whether a journal contains every head that they witness."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import JournalError
from fedtune.journal.witness import Head, Receipt

LONGEST = 1 << 12  # bytes of a line; a receipt has about 700


@dataclass(frozen=True, slots=True)
class Comparison:
    """The newest record that a receipt names, whose receipts were compared, and what a journal lacks, in words."""

    witnessed: int | None
    witnesses: tuple[str, ...]
    ignored: int
    missing: str


def size_of(path: Path | None) -> int:
    """Return how many bytes of receipts there are now; an unreadable file is `journal.unreadable`."""
    try:
        return 0 if path is None else path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error


def read_receipts(path: Path | None, until: int) -> Iterator[Receipt]:
    """Yield the receipts in the first `until` bytes, their signatures checked; a torn last line is ignored.

    Errors: `journal.forged-head` with the line's number, `journal.unreadable`.
    """
    if path is None:
        return
    try:
        with path.open("rb") as file:
            number = 0
            while (line := file.readline(LONGEST)) and file.tell() <= until:
                number += 1
                if line.endswith(b"\n") or len(line) == LONGEST or _is_json(line):
                    yield _receipt(line, f"{path}, line {number}")
    except OSError as error:
        raise _unreadable(path, error) from error


def compare(
    receipts: Iterator[Receipt], witness: str | None, site: tuple[str, set[str]], digests: bytearray
) -> Comparison:
    """Look every witnessed head up in a journal: `site` is its identity and its keys, `digests` its records' hashes.

    Only the receipts of `witness` count where one is asked for. A head of another site that was signed with this site's
    key is one of a history that was written anew from its first record. Errors: `journal.other-site`, those of reading.
    """
    identity, keys = site
    witnessed, missing, ignored = -1, "", 0
    witnesses: dict[str, None] = {}
    for receipt in receipts:
        head = receipt.head
        if witness not in {None, receipt.witness}:
            ignored += 1
            continue
        witnesses[receipt.witness] = None
        if identity and head.site != identity and head.public_key not in keys:
            hint = "give the receipts that the coordinator keeps for this site"
            raise JournalError("other-site", f"a receipt is for another site ({head.site[:16]}…)", hint=hint)
        if head.site == identity and digests[32 * head.sequence : 32 * head.sequence + 32].hex() == head.digest:
            witnessed = max(witnessed, head.sequence)
        else:
            missing = _lack(head, identity, len(digests) // 32)
    return Comparison(None if witnessed < 0 else witnessed, tuple(witnesses), ignored, missing)


def _lack(head: Head, identity: str, records: int) -> str:
    if not records:
        return f"it holds no record, but record {head.sequence} was witnessed: it was put back"
    if head.site != identity:
        return "its first record is not the one that was witnessed, although the key is: it was written anew"
    if head.sequence >= records:
        return f"it ends with record {records - 1}, but record {head.sequence} was witnessed: it was put back"
    return f"record {head.sequence} is not the one that was witnessed: it was put back or written anew"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _receipt(line: bytes, where: str) -> Receipt:
    try:
        receipt = Receipt.from_dict(json.loads(line))
        receipt.check()
    except (ValueError, RecursionError, JournalError) as error:
        reason = error.message if isinstance(error, JournalError) else "it is not JSON"
        raise JournalError("forged-head", f"{where} is no receipt: {reason}", hint="ask the witness again") from error
    return receipt


def _unreadable(path: Path | None, error: OSError) -> JournalError:
    return JournalError("unreadable", f"the receipts {path} cannot be read ({error.strerror or error})")
