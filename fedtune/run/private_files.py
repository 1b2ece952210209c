"""Files and folders of one user alone: private from their first byte, whole or absent, and refused when they are not.

Knows nothing of what is in them. Every refusal of the operating system becomes an error that names the path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import FedtuneError
from fedtune.run.files import sync_folder

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_OTHERS = 0o077
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class PrivateFiles:
    """Private files whose failures are errors of one kind.

    Codes: `permissions`, `disk-full`, `unwritable`, `unreadable`. `unchanged` is what a full disk's hint promises.
    `one_writer` says that callers write one after another: what a killed one left unfinished is then taken over.
    """

    error: type[FedtuneError]
    unchanged: str = "nothing was changed"
    one_writer: bool = False

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write a file so that a crash at any moment leaves the old content or the new, and nobody else reads it."""
        own = "" if self.one_writer else f"{secrets.token_hex(4)}."
        partial = path.with_name(f".{path.name}.{own}partial")
        with self.disk_errors(path):
            if self.one_writer:
                partial.unlink(missing_ok=True)
            try:
                write_new(partial, chunks)
                partial.replace(path)
            except BaseException:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)

    def read(self, path: Path, *, most: int = -1) -> bytes | None:
        """Return a file's content (its first `most` bytes), or None where there is none.

        Error: `permissions` unless it is this user's alone, asked of the open file, so that it is the one read.
        """
        with self.disk_errors(path, "read"):
            try:
                file = path.open("rb")
            except (FileNotFoundError, NotADirectoryError):
                return None
            with file:
                self.check(path, os.fstat(file.fileno()))
                return file.read(most)

    def make_folder(self, path: Path) -> None:
        """Make a folder that only this user enters; one that is there must be so already."""
        with self.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=FOLDER_MODE, exist_ok=True)
            sync_folder(path.parent)
            self.check(path, path.stat())

    def remove(self, path: Path) -> None:
        """Remove a file for good."""
        with self.disk_errors(path):
            path.unlink()
            sync_folder(path.parent)

    def check(self, path: Path, found: os.stat_result) -> None:
        """Refuse what group or others can use in any way, and what neither this user nor root owns."""
        if found.st_uid not in {os.geteuid(), 0}:
            hint = f"chown {os.geteuid()} {shlex.quote(str(path))}"
            raise self.error("permissions", f"{path} belongs to another user (number {found.st_uid})", hint=hint)
        if (mode := stat.S_IMODE(found.st_mode)) & _OTHERS:
            hint = f"chmod go-rwx {shlex.quote(str(path))}"
            raise self.error("permissions", f"{path} is open to group or others (mode {mode:04o})", hint=hint)

    @contextmanager
    def locked(self, path: Path, *, alone: bool) -> Iterator[None]:
        """Hold a lock among processes and threads, `alone` or with others; it falls with the process."""
        with self.disk_errors(path):
            writable = os.O_RDWR if alone else os.O_RDONLY  # NFS wants a writable file for a lock alone
            descriptor = os.open(path, os.O_CREAT | os.O_CLOEXEC | writable, FILE_MODE)
        try:
            with self.disk_errors(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def disk_errors(self, path: Path, act: str = "written") -> Iterator[None]:
        """Turn the operating system's refusals into errors that name the path and what could not be done with it."""
        try:
            yield
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                hint = f"free some space, then do the same again: {self.unchanged}"
                raise self.error("disk-full", f"no space left to write {path}", hint=hint) from error
            slug, reason = ("unreadable" if act == "read" else "unwritable"), error.strerror or str(error)
            hint = f"see who may do that: ls -ld {shlex.quote(str(path.parent))} {shlex.quote(str(path))}"
            raise self.error(slug, f"{path} cannot be {act} ({reason})", hint=hint) from error


def write_new(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that is not there yet, on disk when this returns."""
    with os.fdopen(os.open(path, _NEW, FILE_MODE), "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
