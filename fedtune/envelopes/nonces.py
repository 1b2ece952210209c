"""A party's memory of its streams: one state a stream, each change on disk before `swap` returns.

It stays as small as the number of streams, however many messages they carry. It knows when it began: what was signed
before that may have been taken by a memory that was lost, so a stream without a state begins after it. Knows no message
and nothing of what a state says.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fedtune.envelopes.streams import Stream, damaged_memory
from fedtune.errors import EnvelopeError
from fedtune.run.files import sync_folder

Clock = Callable[[], int]
Role = Literal["sender", "receiver"]
_PATIENCE = 10.0  # seconds to wait for another process's change
_SCHEMA = """
create table if not exists began (moment integer not null);
create table if not exists streams (stream text primary key, state blob not null) without rowid;
insert into began select ? where not exists (select 1 from began);
"""


def unix_ms() -> int:
    """Return the time in milliseconds since 1970 (UTC)."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Change:
    """A stream's state from what it was (None: it had none) to what it shall be."""

    role: Role
    stream: Stream
    old: bytes | None
    new: bytes

    @property
    def name(self) -> str:
        """The stream's key in a memory."""
        return stream_name(self.role, self.stream)


class Nonces(Protocol):
    """What an endpoint needs of a memory."""

    @property
    def began(self) -> int:
        """When the memory was made, in milliseconds since 1970."""

    def read(self, role: Role, stream: Stream) -> bytes | None:
        """Return a stream's state, None for a stream that has not begun."""

    def swap(self, changes: Sequence[Change]) -> bool:
        """Make all changes, durably, and return True; or none and False, where a state is no longer the old one."""


class MemoryNonces:
    """A memory that ends with its process: for tests and for parties that live as long as their streams."""

    def __init__(self, clock: Clock = unix_ms) -> None:
        self.began = clock()
        self._states: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def read(self, role: Role, stream: Stream) -> bytes | None:
        """Return a stream's state."""
        return self._states.get(stream_name(role, stream))

    def swap(self, changes: Sequence[Change]) -> bool:
        """Make all changes or none."""
        with self._lock:
            if any(self._states.get(change.name) != change.old for change in changes):
                return False
            self._states.update({change.name: change.new for change in changes})
            return True


class FileNonces:
    """A memory in one SQLite file (and its `-wal`), readable by its owner alone; several processes may share it.

    Each change is flushed to disk by itself: synchronous=FULL in WAL mode. After an error nothing has changed.
    Errors of all methods: `envelope.damaged-memory`, `envelope.disk-full`, `envelope.unwritable-memory`.
    """

    def __init__(self, path: Path, clock: Clock = unix_ms) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._errors():
            is_new = not path.exists()
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            self.began = self._begin(clock())
            if is_new:
                sync_folder(path.parent)

    def read(self, role: Role, stream: Stream) -> bytes | None:
        """Return a stream's state."""
        with self._lock, self._errors():
            return self._state(stream_name(role, stream))

    def swap(self, changes: Sequence[Change]) -> bool:
        """Make all changes in one transaction, or none."""
        with self._lock, self._errors(), self._transaction():
            if any(self._state(change.name) != change.old for change in changes):
                return False
            for change in changes:
                self._database.execute("insert or replace into streams values (?, ?)", (change.name, change.new))
        return True

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _begin(self, now: int) -> int:
        self._database.execute("pragma journal_mode = wal")
        self._database.execute("pragma synchronous = full")
        with self._transaction():
            *tables, first = _SCHEMA.strip().splitlines()
            for statement in tables:
                self._database.execute(statement)
            self._database.execute(first, (now,))
            moment = self._database.execute("select moment from began").fetchone()[0]
        if not isinstance(moment, int):
            raise damaged_memory(str(self.path), "it does not say when it began")
        return moment

    def _state(self, name: str) -> bytes | None:
        found = self._database.execute("select state from streams where stream = ?", (name,)).fetchone()
        return None if found is None else bytes(found[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("begin immediate")
        try:
            yield
            self._database.execute("commit")
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk has rolled it back already
                self._database.execute("rollback")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _classified(self.path, error) from error
        except OSError as error:
            raise _unwritable(self.path, error) from error


def stream_name(role: Role, stream: Stream) -> str:
    """Return the key under which a memory keeps a stream; no name in it holds a slash."""
    return f"{role}/{stream.sender}/{stream.receiver}/{stream.study}/{stream.direction}"


def _classified(path: Path, error: sqlite3.Error) -> EnvelopeError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest is detail
    if code == sqlite3.SQLITE_FULL:
        return EnvelopeError("disk-full", f"no space left to write {path}", hint="free some space, then start again")
    if code in {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
        return damaged_memory(str(path), str(error))
    return _unwritable(path, error)


def _unwritable(path: Path, error: Exception) -> EnvelopeError:
    hint = "no message is sent or taken before it can be written: check the disk and the folder's owner"
    return EnvelopeError("unwritable-memory", f"{path} cannot be written ({error})", hint=hint)
