"""A disk that refuses, or a kill, at a chosen one of the calls that change something."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

CALLS = ("open", "mkdir", "write", "fsync", "replace", "unlink", "ftruncate")


class Killed(BaseException):
    """The process ends here: nothing after it reaches the disk."""


def kill_at(patch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Let the call of that number be half done, if it writes, and never return, nor any call after it."""
    return _instrument(patch, lambda made: len(made) >= moment, Killed)


def refuse_at(patch: pytest.MonkeyPatch, moment: int, number: int = errno.ENOSPC) -> list[str]:
    """Let the system refuse the call of that number; return the calls that were made."""
    return _instrument(patch, lambda made: len(made) == moment, lambda: OSError(number, os.strerror(number)))


def _instrument(
    patch: pytest.MonkeyPatch, fails: Callable[[list[str]], bool], failure: Callable[[], BaseException]
) -> list[str]:
    made: list[str] = []
    for name in CALLS:
        patch.setattr(os, name, _wrapped(getattr(os, name), name, made, fails, failure))
    return made


def _wrapped(
    real: Callable[..., Any],
    name: str,
    made: list[str],
    fails: Callable[[list[str]], bool],
    failure: Callable[[], BaseException],
) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if name == "open" and len(arguments) > 1 and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return real(*arguments, **options)  # it changes nothing
        already_failed = fails(made)
        made.append(name)
        if fails(made):
            if name == "write" and not already_failed:
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise failure()
        return real(*arguments, **options)

    return call
