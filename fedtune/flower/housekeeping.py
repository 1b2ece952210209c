"""The SuperLink's database kept small: what finished runs and expired messages leave is deleted, free space given back.

Flower deletes a message's objects when its receiver has confirmed them, and what a run has left when somebody asks for
that run after its end. Until then there stay: messages to sites that were away, replies that came too late, objects of
pushes that were cut off. And the database never shrinks: what was in it once leaves its size behind.

`Housekeeper.tidy` deletes through Flower's own state (it finds what to delete by SQL, see
tests/contract/test_flower_housekeeping.py), and rewrites the file when no run is under way and most of it is free; that
takes as long as what is kept is large. It may run at any time beside the SuperLink's other threads. Rows of runs, tasks
and bundles stay: they are what can be told of a run later. Knows no study.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr.common.constant import Status
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.utils import int64_to_uint64
from sqlalchemy.exc import SQLAlchemyError

from fedtune.flower.object_files import ObjectFiles

_FREE_BYTES = 4 * 2**20  # less free space than this is left for the next round
_LEFT_BY_RUNS = """
SELECT run_id FROM run_objects UNION SELECT run_id FROM message_ins
UNION SELECT run_id FROM message_res UNION SELECT run_id FROM object_push_sessions
"""
_EXPIRED = "SELECT message_id FROM message_ins WHERE created_at + ttl < :now"
_REPLIES = "SELECT message_id FROM message_res WHERE reply_to_message_id = :asked"
logger = logging.getLogger("fedtune.link")


@dataclass(frozen=True, slots=True)
class Tidied:
    """What was deleted: remains of so many runs, expired messages, files of no object; bytes of the database freed."""

    runs: int
    messages: int
    files: int
    bytes: int


class Housekeeper:
    """Tidies one SuperLink's state; `clock` is Unix time, as Flower's is."""

    def __init__(self, state: SqlLinkState, database: Path, clock: Callable[[], float] = time.time) -> None:
        self._state, self._database, self._clock = state, database, clock

    def tidy(self) -> Tidied:
        """Delete what nobody can ask for any more; what cannot be done now, because others write, is done next time."""
        try:
            tidied = Tidied(self._finished_runs(), self._expired_messages(), self._lost_files(), self._free_space())
        except (SQLAlchemyError, sqlite3.OperationalError, OSError) as error:
            logger.info("the state is tidied later: %s", type(error).__name__)
            return Tidied(0, 0, 0, 0)
        if tidied != Tidied(0, 0, 0, 0):
            logger.info("tidied the state: %s", asdict(tidied))
        return tidied

    def _finished_runs(self) -> int:
        runs = [int64_to_uint64(row["run_id"]) for row in self._state.query(_LEFT_BY_RUNS)]
        finished = self._state.get_run_info(run_ids=runs, statuses=[Status.FINISHED]) if runs else []
        for run in finished:
            self._state.cleanup_run(run.run_id)
        return len(finished)

    def _expired_messages(self) -> int:
        """Delete messages whose time is over, with what has come in reply: neither is handed out any more."""
        expired = [row["message_id"] for row in self._state.query(_EXPIRED, {"now": self._clock()})]
        for asked in expired:
            replies = [row["message_id"] for row in self._state.query(_REPLIES, {"asked": asked})]
            self._state.delete_messages({asked})
            for message in (asked, *replies):
                self._state.object_store.delete(message)
        return len(expired)

    def _lost_files(self) -> int:
        store = self._state.object_store
        return store.sweep() if isinstance(store, ObjectFiles) else 0

    def _free_space(self) -> int:
        """Rewrite the file if nearly all of it is free and no run is under way; return the bytes given back."""
        under_way = [Status.PENDING, Status.STARTING, Status.RUNNING]
        if self._state.get_run_info(statuses=under_way, limit=1):
            return 0
        with closing(sqlite3.connect(self._database, timeout=1.0, isolation_level=None)) as connection:
            size, free = (_bytes(connection, name) for name in ("page_count", "freelist_count"))
            if free < _FREE_BYTES or free < size / 2:
                return 0
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return size - _bytes(connection, "page_count")


def _bytes(connection: sqlite3.Connection, pages: str) -> int:
    (count,), (size,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in (pages, "page_size"))
    return int(count) * int(size)
