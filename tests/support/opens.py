"""Which files this process opens, as the interpreter's audit hook tells; nothing that Python opens can hide from it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WATCHING: list[list[str]] = []  # a hook can be added and never removed, so it is added once and switched


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Collect the paths that are opened meanwhile."""
    found: list[str] = []
    if not _HOOKED:
        sys.addaudithook(_hook)
        _HOOKED.append(True)
    _WATCHING.append(found)
    try:
        yield found
    finally:
        _WATCHING.remove(found)


_HOOKED: list[bool] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _WATCHING and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.fsdecode(arguments[0])
        for found in _WATCHING:
            found.append(path)
