"""A study's progress as a file that other processes read while it runs: `progress.json`, replaced whole.

It is for people who look and is not durable: what a resumed study needs is in its checkpoint, and a disk that takes no
progress ends no study. Knows no rule and no privacy; ε and metrics are written as they are told.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.journal.chain import moment
from fedtune.simulation.progress import RoundInfo, StudyInfo

PROGRESS_FILE = "progress.json"
_PAUSE = 0.25  # seconds between two writes
_RECENT = 10  # rounds whose seconds say how long the rest takes
logger = logging.getLogger("fedtune.coordinator")


class FileProgress:
    """Writes what it is told to a study's folder, at most four times a second; the last state is always written.

    round, asked, done, failed   the round in flight: how many were asked, who has answered, whose reply failed why
    last                         the last round that ended, as `RoundInfo`
    recent                       seconds of the last ten rounds
    running                      whether an attempt is being made
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROGRESS_FILE
        self._lock = threading.Lock()
        self._later: threading.Timer | None = None
        self._written = 0.0
        self._is_refused = False
        earlier = read_progress(folder)
        self._state: dict[str, Any] = {
            "running": False,
            "study": None,
            "round": 0,
            "asked": 0,
            "done": [],
            "failed": {},
            "last": earlier.get("last"),
            "recent": [],
        }

    def study_started(self, study: StudyInfo) -> None:
        """Begin an attempt; the rounds before it stay as they were told."""
        self._note(running=True, study=asdict(study))

    def round_started(self, number: int, asked: int | None = None) -> None:
        """Count sites from zero again."""
        expected = asked if asked is not None else (self._state["study"] or {}).get("sites", 0)
        self._note(round=number, asked=expected, done=[], failed={})

    def site_done(self, name: str) -> None:
        """Note a site whose reply was accepted."""
        self._note(done=[*self._state["done"], name])

    def site_failed(self, name: str, code: str) -> None:
        """Note a site that failed, and why."""
        self._note(failed=self._state["failed"] | {name: code})

    def round_done(self, result: RoundInfo) -> None:
        """Note a round that has ended."""
        last = asdict(replace(result, failed=dict(result.failed)))
        self._note(last=last, recent=[*self._state["recent"], round(result.seconds, 3)][-_RECENT:])

    def study_done(self) -> None:
        """End an attempt, and leave its last state in the file."""
        with self._lock:
            self._cancel()
            self._state = self._state | {"running": False}
            self._write()

    def _note(self, **changes: Any) -> None:
        """Take changes over, and write them now, or together with what comes within the pause."""
        with self._lock:
            self._state = self._state | changes
            left = self._written + _PAUSE - time.monotonic()
            if left <= 0:
                self._cancel()
                self._write()
            elif self._later is None:
                self._later = threading.Timer(left, self._write_late)
                self._later.daemon = True
                self._later.start()

    def _write_late(self) -> None:
        with self._lock:
            if self._later is not None:
                self._later = None
                self._write()

    def _cancel(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _write(self) -> None:
        """Replace the file without waiting for the disk: after a loss of power an older one, or none, will do."""
        self._written = time.monotonic()
        text = json.dumps(self._state | {"at": moment(datetime.now(UTC))}, ensure_ascii=False)
        partial = self._path.with_name(f".{self._path.name}.partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self._path)
            self._is_refused = False
        except OSError as error:
            if not self._is_refused:
                logger.warning("progress is not written: %s", error.strerror)
            self._is_refused = True
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def read_progress(folder: Path) -> dict[str, Any]:
    """Return what a study has told last, empty where nothing readable is."""
    try:
        found = json.loads((folder / PROGRESS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
