"""Folders of a release: the names in them, and how one comes into being whole or not at all.

Knows nothing of what the files say.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedtune.errors import ReleaseError, RunError
from fedtune.run.files import disk_errors, sync_folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
ABOUT_FILE = "fedtune.json"
CARD_FILE = "README.md"
MANIFEST_FILE = "release.json"
SIGNATURES_FILE = "release.signatures.json"
UNSIGNED = frozenset({MANIFEST_FILE, SIGNATURES_FILE})  # what no manifest can list
_CHUNK = 1 << 22
_ELSEWHERE = "nothing is left of it; name a folder that can be written, with space, by --out DIR"


def require_free(destination: Path) -> None:
    """Refuse a place where anything is: `release.exists`."""
    try:
        taken = destination.is_symlink() or (destination.exists() and not _is_empty_folder(destination))
    except OSError as error:
        message = f"{destination} cannot be looked at ({error.strerror or error})"
        raise ReleaseError("unwritable", message, hint="name another folder with --out DIR") from error
    if taken:
        raise ReleaseError("exists", f"{destination} is there already", hint="name another folder with --out DIR")


@contextmanager
def whole_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `destination` that takes its place when the block ends, and is gone when it fails.

    With `replace` the folder that was there is removed just before. What a killed process has left is removed first.
    Errors: `release.exists`, `run.unwritable`, `run.disk-full`.
    """
    if not replace:
        require_free(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    with disk_errors(destination):
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
    try:
        yield partial
        with disk_errors(destination):
            _sync(partial)
            if replace and destination.exists():
                shutil.rmtree(destination)
            partial.replace(destination)
            sync_folder(destination.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def walk(folder: Path) -> dict[str, Path]:
    """Return every entry below a folder that is no plain folder, by its path with slashes, sorted."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            found[path.relative_to(folder).as_posix()] = path
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def size_of(folder: Path) -> int:
    """Return how many bytes the files of a folder hold."""
    return sum(path.stat().st_size for path in walk(folder).values())


@contextmanager
def release_disk(place: Path) -> Iterator[None]:
    """Say of a place that cannot be written that it is a release's, not a run's."""
    try:
        yield
    except RunError as error:
        if error.code not in {"run.disk-full", "run.unwritable"}:
            raise
        raise ReleaseError(error.code.removeprefix("run."), error.message, hint=_ELSEWHERE) from error
    except SafetensorError as error:  # has no errno
        slug = "disk-full" if "(os error 28)" in str(error) else "unwritable"
        raise ReleaseError(slug, f"{place} cannot be written ({error})", hint=_ELSEWHERE) from error
    except OSError as error:
        message = f"{place} cannot be written ({error.strerror or error})"
        raise ReleaseError(_slug(error), message, hint=_ELSEWHERE) from error


def _slug(error: OSError) -> str:
    return "disk-full" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "unwritable"


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _sync(folder: Path) -> None:
    """Put every file of a folder on disk, then the names."""
    for path in walk(folder).values():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)
