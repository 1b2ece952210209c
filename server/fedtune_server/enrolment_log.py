"""What a coordinator has decided about who takes part: one line a decision, never changed, on disk before it counts.

    {"entry":ENTRY,"kind":KIND,"previous":HEX,"sequence":N,"time":TIME} and a newline, canonical (RFC 8785)

`previous` is the SHA-256 of the line before it without its newline, 64 zeros in the first. That shows damage, and a
line that was changed or taken out of the middle; whoever may write the file can write all of it anew, so back it up
where it cannot be changed. A last line without its newline was never acknowledged: it is left out, and cut at the next
decision.
Knows no rule: `enrolment_state` does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import rfc8785
from pydantic import Field

from fedtune.errors import EnrolmentError, FedtuneError
from fedtune.journal.canonical import read_canonical
from fedtune.journal.chain import NOTHING, moment
from fedtune.journal.entries import Hash, SiteName
from fedtune.pki.documents import Id, Instant, Serial, Strict
from fedtune.pki.files import disk_errors
from fedtune.pki.grants import Grant
from fedtune.pki.invitations import Offer
from fedtune.pki.names import Federation
from fedtune.run.files import sync_folder

Reason = Annotated[str, Field(max_length=1000)]


class Entry(Strict):
    """One decision."""

    kind: ClassVar[str]


class Founded(Entry):
    """The federation begins, and which key signs its papers."""

    kind = "founded"
    federation: Federation
    coordinator: Hash


class Invited(Entry):
    """A site may enrol."""

    kind = "invited"
    offer: Offer


class Withdrawn(Entry):
    """An invitation that was not used is good for nothing any more."""

    kind = "withdrawn"
    invitation: Id


class Enrolled(Entry):
    """A site takes part with the keys of a grant; `invitation` is None for a renewal.

    `keys` is the lineage of its signing key, `ends` when each but the last was replaced.
    """

    kind = "enrolled"
    invitation: Id | None
    keys: tuple[Hash, ...]
    ends: tuple[Instant, ...]
    grant: Grant


class CertificateRevoked(Entry):
    """One certificate is refused from now on."""

    kind = "certificate-revoked"
    serial: Serial
    reason: Reason


class SiteRevoked(Entry):
    """A site is refused from now on, with every certificate and key that it had."""

    kind = "site-revoked"
    site: SiteName
    reason: Reason


_KINDS: dict[object, type[Entry]] = {
    entry.kind: entry for entry in (Founded, Invited, Withdrawn, Enrolled, CertificateRevoked, SiteRevoked)
}


@dataclass(frozen=True, slots=True)
class Line:
    """An entry, its number and when it was written (UTC)."""

    sequence: int
    time: str
    entry: Entry


class Log:
    """The file; whoever appends holds a lock of its own around `mend`, `read` and `append`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stamp(self) -> tuple[int, int, int]:
        """Return what differs once the file was written to. Error: `enrolment.missing`."""
        try:
            found = self.path.stat()
        except FileNotFoundError as error:
            hint = "restore it from a backup, or make a federation: fedtune server init"
            raise EnrolmentError("missing", f"there is no {self.path}", hint=hint) from error
        except OSError as error:
            raise EnrolmentError("unreadable", f"{self.path} cannot be read ({error.strerror})") from error
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read(self) -> tuple[tuple[Line, ...], str]:
        """Return all lines and the hash that the next one names. Error: `enrolment.damaged`."""
        with disk_errors(self.path, "read"):
            *whole, _torn = self.path.read_bytes().split(b"\n")
        lines: list[Line] = []
        previous = NOTHING
        for raw in whole:
            lines.append(self._line(raw, len(lines), previous))
            previous = hashlib.sha256(raw).hexdigest()
        return tuple(lines), previous

    def mend(self) -> None:
        """Make the file if there is none, cut a torn last line, and flush what a killed process may not have."""
        with disk_errors(self.path):
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(os.dup(descriptor), "rb") as file:
                    content = file.read()
                if len(content) != (whole := content.rfind(b"\n") + 1):
                    os.ftruncate(descriptor, whole)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if is_new:
                sync_folder(self.path.parent)

    def append(self, entries: Sequence[Entry], now: datetime) -> None:
        """Write entries with one write and one flush; when that fails the file is as before, as far as the disk allows.

        Errors: `enrolment.disk-full`, `enrolment.unwritable`.
        """
        lines, previous = self.read()
        data = b""
        for sequence, entry in enumerate(entries, len(lines)):
            raw = _spell(Line(sequence, moment(now), entry), previous)
            previous = hashlib.sha256(raw).hexdigest()
            data += raw + b"\n"
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                _write(descriptor, data)
            finally:
                os.close(descriptor)

    def _line(self, raw: bytes, sequence: int, previous: str) -> Line:
        try:
            content = read_canonical(raw)
            entry = _KINDS[content["kind"]].model_validate_json(rfc8785.dumps(content["entry"]))
            line = Line(sequence, content["time"], entry)
            follows = _spell(line, previous) == raw
        except (ValueError, TypeError, KeyError, RecursionError, FedtuneError) as error:  # a ValidationError is one
            raise self._damaged(sequence) from error
        if not follows:
            raise self._damaged(sequence)
        return line

    def _damaged(self, sequence: int) -> EnrolmentError:
        hint = "restore it from a backup: without it nobody knows who was revoked"
        return EnrolmentError("damaged", f"{self.path} is damaged at line {sequence + 1}", hint=hint)


def _spell(line: Line, previous: str) -> bytes:
    content: dict[str, Any] = {"previous": previous, "sequence": line.sequence, "time": line.time}
    return rfc8785.dumps({**content, "kind": line.entry.kind, "entry": line.entry.model_dump(mode="json")})


def _write(descriptor: int, data: bytes) -> None:
    size = os.fstat(descriptor).st_size
    try:
        while data:  # a disk that fills up takes a part first
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
