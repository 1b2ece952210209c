"""Files of one user alone: private from the first byte, whole or absent, read only while nobody else can write them.

Knows nothing of what is in them. Every refusal of the operating system becomes an error that names the path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.errors import EnrolmentError
from fedtune.run.files import sync_folder

_OTHERS = 0o077
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def make_private_folder(path: Path) -> None:
    """Make a folder that only this user enters; one that is there must be so already: `enrolment.permissions`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent)
        _check(path, path.stat())


def write_private(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, on disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, _NEW, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)


def read_private(path: Path) -> bytes | None:
    """Return a file's content, None where there is none. Error: `enrolment.permissions` unless it is this user's."""
    with disk_errors(path, "read"):
        try:
            file = path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return None
        with file:
            _check(path, os.fstat(file.fileno()))
            return file.read()


@contextmanager
def locked(path: Path, *, alone: bool) -> Iterator[None]:
    """Hold a lock among processes and threads, `alone` or with others; it falls with the process."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with disk_errors(path):
            fcntl.flock(descriptor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, act: str = "written") -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the path and what could not be done with it."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            hint = "free some space, then do the same again: nothing was changed"
            raise EnrolmentError("disk-full", f"no space left to write {path}", hint=hint) from error
        slug, reason = ("unreadable" if act == "read" else "unwritable"), error.strerror or str(error)
        hint = f"see who may do that: ls -ld {shlex.quote(str(path.parent))} {shlex.quote(str(path))}"
        raise EnrolmentError(slug, f"{path} cannot be {act} ({reason})", hint=hint) from error


def _check(path: Path, found: os.stat_result) -> None:
    """Refuse what group or others can use in any way, and what neither this user nor root owns."""
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in {os.geteuid(), 0} or mode & _OTHERS:
        hint = f"chown {os.geteuid()} {shlex.quote(str(path))}; chmod go-rwx {shlex.quote(str(path))}"
        message = f"{path} is another user's, or open to others (mode {mode:04o})"
        raise EnrolmentError("permissions", message, hint=hint)
