"""A folder for keys that other programs take from files only: in memory where there is such a place, gone at the end.

Knows no key.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtune.run.files import make_folder, write_whole

_PREFIX = "fedtune-site-"


@contextmanager
def private_folder(run: Path) -> Iterator[Path]:
    """Make a folder that only this user enters, and remove it after the block; it is in `run` where no memory is.

    `run/private` names it meanwhile, so that the next call removes what a killed process has left. The memory of
    XDG_RUNTIME_DIR and /dev/shm can still be swapped out: encrypt swap. Errors: `run.*` for the disk.
    """
    make_folder(run)
    note = run / "private"
    _sweep(note)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_memory() or run.absolute()))  # mode 0700
    try:
        write_whole(note, os.fsencode(folder))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            note.unlink(missing_ok=True)


def _memory() -> Path | None:
    """Return the first place in memory that this user can write to."""
    for path in filter(None, (os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm")):  # noqa: S108 - mkdtemp makes it private
        if os.path.isabs(path) and os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK):  # noqa: PTH112, PTH117 - strings
            return Path(path)
    return None


def _sweep(note: Path) -> None:
    with suppress(OSError, ValueError):
        left = Path(os.fsdecode(note.read_bytes()))
        found = left.lstat()
        if left.name.startswith(_PREFIX) and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            shutil.rmtree(left, ignore_errors=True)
