"""Files that are whole or absent: written beside their place, flushed to disk, then renamed into it."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless it is there."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def append_line(path: Path, line: str, *, durable: bool = True) -> None:
    """Append one line; with `durable` it is on disk when this returns."""
    with disk_errors(path):
        is_new = not path.exists()
        with path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if is_new and durable:
            sync_folder(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line (its writer was killed) is ignored, any other damage is an error."""
    if not path.exists():
        return []
    *whole, _torn = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise RunError("damaged", f"{path} is damaged before its last line", hint="restore it from a backup") from error


def cut_torn_line(path: Path) -> None:
    """Cut an incomplete last line, so that the next append starts a line of its own."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        write_whole(path, data[: data.rfind(b"\n") + 1])


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the path."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            hint = "free some space, then continue with fedtune simulate --resume RUN"
            raise RunError("disk-full", f"no space left to write {path}", hint=hint) from error
        hint = "choose another run folder with run.dir=FOLDER, or mend this one"
        raise RunError("unwritable", f"{path} cannot be written ({error.strerror or error})", hint=hint) from error
