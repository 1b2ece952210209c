"""Flower's database as the one process of a SuperLink uses it: transactions in turn, with small caches.

SQLite lets one transaction write at a time; the others look again after pauses of up to 100 ms, in no order, and give
up in the end. With pieces of 5 MiB on their way to and from two sites there was always one that wrote: others waited
for more than 30 seconds, and some were answered with an error. Here transactions wait for one another in this process,
in the order in which they came. Knows no table.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.supercore import sql_mixin
from flwr.supercore.sql_mixin import SqlMixin
from sqlalchemy.orm import Session

PRAGMAS = (
    ("busy_timeout", "30000"),  # ms; nobody else writes but housekeeping, for a moment
    ("journal_mode", "WAL"),
    ("journal_size_limit", str(2**26)),
    ("synchronous", "NORMAL"),
    ("foreign_keys", "ON"),
    ("cache_size", "-4000"),  # kB a connection, of which there are up to 30; Flower's are 64 MB each
    ("temp_store", "MEMORY"),
    ("mmap_size", "0"),  # Flower's 256 MB count as this process's memory
)
_whole_session = SqlMixin.session


def prepare() -> None:
    """Make Flower use its database like this in this process; call it before Flower opens it."""
    turns = Turns()

    @contextmanager
    def session(state: SqlMixin) -> Iterator[Session]:
        with turns, _whole_session(state) as opened:
            yield opened

    vars(sql_mixin)["SQLITE_PRAGMAS"] = PRAGMAS
    setattr(SqlMixin, "session", session)  # noqa: B010 - mypy forbids to assign to a method


class Turns:
    """A lock that goes to whoever has waited longest, and that a thread which has it may take again."""

    def __init__(self) -> None:
        self._waiting: deque[threading.Lock] = deque()
        self._changing = threading.Lock()
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me, turn = threading.get_ident(), threading.Lock()
        with self._changing:
            if self._holder in {None, me}:
                self._holder, self._depth = me, self._depth + 1
                return
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()  # until it is released below
        self._holder, self._depth = me, 1

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._depth -= 1
            if self._depth:
                return
            if self._waiting:
                self._holder = 0  # nobody's, until the one whose turn it is has woken up
                self._waiting.popleft().release()
            else:
                self._holder = None
