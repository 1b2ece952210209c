"""Reads what the processes of a machine have logged, as one log in the order of time. Knows no process.

Each role has ROLE.jsonl and, older, ROLE.jsonl.1, .2, …: files are renamed while they are read, and a file once opened
is read to its end whatever its name is by then.
"""

from __future__ import annotations

import heapq
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import BinaryIO

from fedtune.errors import ProcessError
from fedtune.processes.log_lines import Line, moment, parse

_NAME = re.compile(r"(?P<role>[\w-]+)\.jsonl(?:\.\d+)?")
_EVERY = 0.3


def read(
    folder: Path,
    *,
    follow: bool = False,
    since: datetime | None = None,
    roles: Collection[str] | None = None,
    going: Callable[[], bool] = lambda: True,
) -> Iterator[Line]:
    """Yield the lines of a folder's logs, oldest first; with `follow` then those that are written, while `going`.

    `since` needs a time zone. `roles` picks processes by their names. What is no line of ours is left out. Errors:
    `process.no-logs` without such a folder, `process.unknown-role` for a role that never logged here.
    """
    if not folder.is_dir():
        raise ProcessError("no-logs", f"{folder} is no folder", hint="start the processes first, or name their folder")
    found = _roles(folder)
    for role in sorted(set(roles or ()) - found):
        hint = f"those with a log are {', '.join(sorted(found)) or 'none'}"
        if not follow:
            raise ProcessError("unknown-role", f"no process named {role} has logged in {folder}", hint=hint)
    return _read(folder, follow, since, roles, going)


def _read(
    folder: Path, follow: bool, since: datetime | None, roles: Collection[str] | None, going: Callable[[], bool]
) -> Iterator[Line]:
    tails: dict[str, _Tail] = {}
    with ExitStack() as stack:
        while True:
            for role in sorted(_roles(folder) - set(tails)):
                if roles is None or role in roles:
                    tails[role] = _Tail(folder / f"{role}.jsonl")
                    stack.callback(tails[role].close)
            for line in heapq.merge(*(tail.lines() for tail in tails.values()), key=moment):
                if since is None or moment(line) >= since:
                    yield line
            if not follow or not going():
                return
            time.sleep(_EVERY)


def _roles(folder: Path) -> set[str]:
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return {match["role"] for match in matches if match}


class _Tail:
    """One role's lines, from the oldest file that is kept to the newest."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._torn = b""

    def lines(self) -> Iterator[Line]:
        """Yield what was written since the last call."""
        while True:
            for raw in self._file or ():
                whole = self._torn + raw
                self._torn = b"" if whole.endswith(b"\n") else whole
                line = None if self._torn else parse(whole)
                if line is not None:
                    yield line
            if not self._advance():
                return

    def close(self) -> None:
        """Close the file that is being read."""
        if self._file is not None:
            self._file.close()

    def _advance(self) -> bool:
        """Go on to the file after this one; False when this is the newest."""
        with ExitStack() as stack:
            files = {_identity(file): file for file in map(stack.enter_context, self._opened())}
            order = list(reversed(files))
            own = order.index(_identity(self._file)) if self._file and _identity(self._file) in files else -1
            if own + 1 >= len(order):
                return False
            # The file that was the newest gets no line after it was renamed; what it had then is read before.
            if self._has_more():
                return True
            self.close()
            self._file, self._torn = os.fdopen(os.dup(files[order[own + 1]].fileno()), "rb"), b""
            return True

    def _has_more(self) -> bool:
        return self._file is not None and os.fstat(self._file.fileno()).st_size > self._file.tell()

    def _opened(self) -> Iterator[BinaryIO]:
        """Open the role's files from the newest to the oldest: renaming goes the same way, so that none is missed."""
        missing = 0
        for number in count():
            path = self._path if number == 0 else self._path.with_name(f"{self._path.name}.{number}")
            with suppress(FileNotFoundError):
                yield path.open("rb")
                missing = 0
                continue
            missing += 1
            if missing > 1:  # one may be missing while files are renamed
                return


def _identity(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino
