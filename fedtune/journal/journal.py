"""A journal in its file: one writer, each record on disk before what it permits is done.

Opening reads and checks every record. A last line that a kill or a full disk left incomplete is cut, because a record
counts only once its write has returned; damage anywhere else stops everything (`journal.tampered`). After a failed
write or flush nothing more is written until the file was closed, opened and read from its first record again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import JournalError
from fedtune.journal.chain import Chain, Record, is_torn, moment, public_hex, tampered
from fedtune.journal.entries import ClockSet, Entry, SiteCreated
from fedtune.journal.state import SiteState
from fedtune.run.files import sync_folder

Clock = Callable[[], datetime]
Keys = Callable[[str], Ed25519PrivateKey]  # the private key whose public half this is
SLACK = timedelta(minutes=5)  # a clock that is corrected by less than this is not one that was set back
PATIENCE = 5.0  # seconds to wait for another writer: a client holds the journal for a record, not for a round
_FIRST = b'{"body":{"entry":'
_FULL = {errno.ENOSPC, errno.EDQUOT}


def utc_now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)


class Journal:
    """One site's journal, held for writing by one process at a time.

    `state` is always what the records on disk say. `cut` is how many bytes of an incomplete record were cut at the last
    opening. `with journal:` takes it again after `close`; then only what another process has added is read. `signer`
    is the private key, or finds the one that the journal says is in force.
    """

    def __init__(self, path: Path, signer: Ed25519PrivateKey | Keys, clock: Clock = utc_now) -> None:
        self.path = path
        self._clock = clock
        self._keys: Keys = (lambda _: signer) if isinstance(signer, Ed25519PrivateKey) else signer
        self._signer = signer if isinstance(signer, Ed25519PrivateKey) else None
        self._file: int | None = None
        self._holds = 0
        self._forget()

    def _forget(self) -> None:
        """Know nothing of the file, so that all of it is read next."""
        self.state, self.chain, self.cut = SiteState(), Chain(), 0
        self._digests = bytearray()
        self._size, self._last = 0, 0
        self._broken = False

    @classmethod
    def create(cls, path: Path, site: str, signer: Ed25519PrivateKey, clock: Clock = utc_now) -> Self:
        """Begin a journal; what a killed `create` left is taken over, any other file is refused.

        Errors: `journal.exists`, `journal.in-use`, `journal.disk-full`, `journal.unwritable`.
        """
        journal = cls(path, signer, clock)
        entry = SiteCreated(site=site, public_key=public_hex(signer))
        journal._take(os.O_CREAT)
        try:
            _require_beginning(path)
            with _disk_errors(path):
                os.ftruncate(journal._descriptor, 0)
            journal.append(entry)
            with _disk_errors(path):
                sync_folder(path.parent)
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def open(cls, path: Path, signer: Ed25519PrivateKey | Keys, clock: Clock = utc_now) -> Self:
        """Take a journal that exists, check every record of it and cut an incomplete last one.

        Errors: `journal.missing`, `journal.in-use`, `journal.tampered`, `journal.other-key`, `journal.unwritable`.
        """
        journal = cls(path, signer, clock).__enter__()
        journal._holds = 0  # noqa: SLF001 - its own; `with Journal.open(…)` is the first hold, and ends it
        return journal

    def __enter__(self) -> Self:
        """Hold the file and read what this process does not know yet; an inner hold ends with the outer one."""
        if self._holds:
            self._holds += 1
            return self
        if self._broken:
            self._forget()
        self._take(0)
        try:
            self._refuse_changed()
            lines, ending = self._new_lines()
            for line in lines:
                self.chain, record = self.chain.accept(line)
                self.state.apply(record)
                self._count(record, line)
            self._require_own_key()
            if lines or self.cut:
                self._settle(ending)  # not before all is checked: a damaged journal stays as it was found
        except BaseException:
            self.close()
            raise
        self._holds = 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holds -= 1
        if self._holds <= 0:
            self.close()

    def close(self) -> None:
        """Let another process hold the journal."""
        self._holds = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def append(self, *entries: Entry) -> tuple[Record, ...]:
        """Sign entries, chain them, and return when all are on disk: one write and one flush.

        Errors: `journal.inconsistent` for an entry that does not follow from the others, `journal.clock-back`,
        `journal.disk-full`, `journal.not-durable`, `journal.unwritable`; none of them leaves part of an entry behind.
        """
        if self._broken:
            raise JournalError("not-durable", f"{self.path} failed before", hint="close it, then open it anew")
        self._require_in_place()
        now, lines, chain, records = self._now(entries), [], self.chain, []
        self._broken = True  # until all of it is on disk: the state below runs ahead of the file
        for entry in entries:
            lines.append(chain.extend(entry, now, self._key))
            chain, record = chain.accept(lines[-1])  # a signature that came out wrong must never reach the disk
            self.state.apply(record)
            records.append(record)
        self._write(b"".join(line + b"\n" for line in lines))
        for line, record in zip(lines, records, strict=True):
            self._count(record, line)
        self.chain, self._broken = chain, False
        return tuple(records)

    def rotate(self, signer: Ed25519PrivateKey, entry: Entry) -> None:
        """Append the entry that puts a new key in force, and sign with that key from now on."""
        self.append(entry)
        self._signer = signer
        self._require_own_key()

    def digest_at(self, sequence: int) -> str | None:
        """Return the hash of a record, None beyond the last."""
        return bytes(self._digests[32 * sequence : 32 * sequence + 32]).hex() or None

    def sign(self, statement: bytes) -> str:
        """Sign a statement about this journal (a head); the caller puts a context label of its own in front."""
        return self._key.sign(statement).hex()

    def lines(self) -> Iterator[bytes]:
        """Yield every accepted line without its newline, from the file."""
        with self.path.open("rb") as file:
            for _ in range(self.chain.length):
                yield file.readline().removesuffix(b"\n")

    @property
    def _key(self) -> Ed25519PrivateKey:
        if self._signer is None:
            raise JournalError("closed", f"{self.path} was not read yet", hint="open it first")
        return self._signer

    @property
    def _descriptor(self) -> int:
        if self._file is None:
            raise JournalError("closed", f"{self.path} is not held by this process", hint="open it first")
        return self._file

    def _take(self, creating: int) -> None:
        if self._file is not None:
            return
        with _disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | creating, 0o600)
        until = time.monotonic() + PATIENCE
        while not _locked(descriptor):
            if time.monotonic() > until:
                os.close(descriptor)
                raise JournalError("in-use", f"{self.path} is held by another process", hint="stop that one first")
            time.sleep(0.01)
        self._file = descriptor

    def _refuse_changed(self) -> None:
        """Refuse a file that no longer ends where this process left it."""
        if self._size == 0:
            return
        last = os.pread(self._descriptor, self._last, self._size - self._last)
        if hashlib.sha256(last.removesuffix(b"\n")).hexdigest() != self.chain.digest:
            raise tampered(self.chain.length - 1, "it was changed while the site was running")

    def _require_in_place(self) -> None:
        """Refuse to write where the path names another file, or the file does not end where this process left it."""
        with _disk_errors(self.path):
            held, named = os.fstat(self._descriptor), self.path.stat()
        if not os.path.samestat(held, named) or held.st_size != self._size:
            raise tampered(self.chain.length, "the file was changed or replaced while it was held")

    def _new_lines(self) -> tuple[list[bytes], bytes]:
        """Return the lines that are not read yet, and what the last of them lacks."""
        *lines, tail = self._rest().split(b"\n")
        self.cut = 0
        if not tail:
            return lines, b""
        if is_torn(tail, self.chain.length + len(lines)):
            self.cut = len(tail)
            return lines, b""
        return [*lines, tail], b"\n"

    def _rest(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._size)
            return file.read()

    def _settle(self, ending: bytes) -> None:
        """Cut an incomplete record or end the last line; flush what was read: its writer may have been killed."""
        with _disk_errors(self.path):
            if self.cut or ending:
                os.ftruncate(self._descriptor, self._size - len(ending))
                os.write(self._descriptor, ending)
            os.fsync(self._descriptor)

    def _require_own_key(self) -> None:
        if self.chain.length == 0:
            raise JournalError("missing", f"{self.path} holds no record", hint="begin again: fedtune client init")
        if self._signer is None or self.chain.public_key != public_hex(self._signer):  # another process may rotate
            self._signer = self._keys(self.chain.public_key)
        if self.chain.public_key != public_hex(self._signer):
            raise JournalError(
                "other-key",
                f"{self.path} is signed by the key {self.chain.public_key[:16]}…, the vault holds another",
                hint="restore the vault that belongs to this journal: fedtune client vault restore FILE",
            )

    def _now(self, entries: tuple[Entry, ...]) -> str:
        """Return the time to write; a clock that stands before the last record is refused, because grants expire."""
        now, last = moment(self._clock()), self.chain.time
        if now >= last or isinstance(entries[0], ClockSet):
            return now
        if datetime.fromisoformat(last) - datetime.fromisoformat(now) > SLACK:
            raise JournalError(
                "clock-back",
                f"the clock says {now}, but the journal's last record was written at {last}",
                hint="set the clock; if the record's time is the wrong one: fedtune client journal accept-clock",
            )
        return last

    def _write(self, data: bytes) -> None:
        try:
            while data:  # a disk that fills up takes a part first
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            self._withdraw()
            raise _disk_error(self.path, error) from error

    def _withdraw(self) -> None:
        """Take back a part that was written; where that fails too, the next opening cuts it."""
        try:
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)
        except OSError:
            pass
        self.close()

    def _count(self, record: Record, line: bytes) -> None:
        self._digests += bytes.fromhex(record.digest)
        self._last = len(line) + 1
        self._size += self._last


def _require_beginning(path: Path) -> None:
    """Refuse what a killed `create` does not leave: it leaves nothing, or a part of a first record."""
    data = path.read_bytes()
    if b"\n" in data or data[: len(_FIRST)] != _FIRST[: len(data)]:
        raise JournalError("exists", f"{path} already is a journal", hint="fedtune client journal show")


class _disk_errors:  # noqa: N801 - a context manager reads as a function
    """Turn the operating system's refusals into errors that name the journal."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise _disk_error(self.path, error) from error


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _disk_error(path: Path, error: OSError) -> JournalError:
    if error.errno in _FULL:
        return JournalError("disk-full", f"no space left to write {path}", hint="free some space, then start again")
    if isinstance(error, FileNotFoundError):
        return JournalError("missing", f"there is no journal {path}", hint="begin one: fedtune client init")
    if error.errno == errno.EIO:
        hint = "check the disk, then start again: every record is read anew"
        return JournalError("not-durable", f"{path} could not be flushed to disk", hint=hint)
    hint = "the site's folder must be writable by the client, and on a disk that works"
    return JournalError("unwritable", f"{path} cannot be written ({error.strerror or error})", hint=hint)
