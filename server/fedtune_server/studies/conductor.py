"""Applies what `decide` says: starts, restarts and stops Flower's runs of the studies in a folder, one at a time.

Everything that outlasts this process is in the studies' folders. A study is started in the order of submission; one
that waits, has failed or is damaged holds up no other. Knows no message and no site.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedtune.errors import FedtuneError
from fedtune.journal.journal import Clock, utc_now
from fedtune_server.studies.decide import Decision, Seen, State, decide, judge
from fedtune_server.studies.newest import newest_round
from fedtune_server.studies.outcome_file import read_outcome
from fedtune_server.studies.record import Attempts, read_attempts, write_attempts
from fedtune_server.studies.store import Shelf, StoredStudy, StudyStore

if TYPE_CHECKING:
    from fedtune.flower.bundle import Bundle
    from fedtune.flower.submission import RunFacts

logger = logging.getLogger("fedtune.conductor")
# Seconds until Flower is asked again, by what the studies are doing; a study that changed is looked at at once.
_REST: Mapping[State, float] = {"queued": 0, "starting": 0, "stopping": 0, "waiting": 2, "running": 2}
_QUIET = 30.0


class Runs(Protocol):
    """What is used of `fedtune.flower.submission.Control`."""

    def runs(self) -> tuple[RunFacts, ...]:
        """Return the newest runs, newest first."""

    def start(self, bundle: Bundle) -> int:
        """Start a run of a bundle."""

    def stop(self, run: int) -> bool:
        """Stop a run."""


@dataclass(slots=True)
class _Counted:
    """A study's attempts as they stand in memory, where a full disk cannot lose them."""

    submitted: str
    attempts: Attempts
    is_saved: bool = True


class Conductor:
    """One per coordinator; `tick` is called every second."""

    def __init__(self, store: StudyStore, clock: Clock = utc_now, steady: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock, self._steady = store, clock, steady
        self._up_since = clock()
        self._counted: dict[Path, _Counted] = {}
        self._shelf = Shelf(())
        self._next_look = 0.0
        self._said: dict[object, str] = {}
        self._is_orphaned = self._is_new = True
        self._orphans: set[int] = set()
        self.decisions: dict[Path, Decision] = {}

    def tick(self, control: Runs) -> None:
        """Look at the studies and at Flower's runs, and do what comes next. Errors: of `Control` and the store."""
        shelf = self._store.read()
        if shelf == self._shelf and self._steady() < self._next_look:
            return
        self._note_damage(shelf)
        runs = control.runs()
        self.decisions = {study.path: self._decided(study, runs) for study in shelf.studies}
        stops = [*_foreign(shelf.studies, runs), *(run for found in self.decisions.values() for run in found.stop)]
        if self._is_orphaned and not self._is_new:
            self._orphans |= {run.number for run in runs if run.status not in {"pending", "finished"}}
        for run in stops:
            _stop(control, run)
        self._is_orphaned = self._is_new = False
        if not any(run.status != "finished" for run in runs):
            self._start_next(control, shelf.studies)
        self._shelf = shelf
        rests = (_REST.get(found.state, _QUIET) for found in self.decisions.values())
        self._next_look = self._steady() + min(rests, default=_QUIET)

    def look_again(self) -> None:
        """Forget that nothing was to be done: the SuperLink is another one now, and its state may be older."""
        self._next_look = 0.0

    def executor_lost(self) -> None:
        """Take every run that has begun for one whose process is gone, as all are when a coordinator is started."""
        self._is_orphaned, self._next_look = True, 0.0

    def _decided(self, study: StoredStudy, runs: Sequence[RunFacts]) -> Decision:
        counted = self._counted_of(study)
        now = self._clock()
        seen = Seen(
            study.record,
            counted.attempts,
            study.own(runs),
            read_outcome(study.path),
            newest_round(study.path),
            study.is_finished,
            self._is_orphaned,
            self._orphans,
        )
        judged = judge(seen, now)
        if judged is not counted.attempts:
            _tell(study, counted.attempts, judged)
            counted.attempts, counted.is_saved = judged, False
        self._save(study, counted)
        return decide(replace(seen, attempts=judged), now, self._up_since)

    def _counted_of(self, study: StoredStudy) -> _Counted:
        known = self._counted.get(study.path)
        if known is None or known.submitted != study.record.submitted:
            try:
                attempts = read_attempts(study.path)
            except FedtuneError as error:
                logger.warning("the attempts at %s are counted anew: %s", study.path.name, error.code)
                attempts = Attempts(resumed=study.record.resumed)
            known = self._counted[study.path] = _Counted(study.record.submitted, attempts)
        return known

    def _save(self, study: StoredStudy, counted: _Counted) -> None:
        if counted.is_saved:
            return
        try:
            write_attempts(study.path, counted.attempts)
            counted.is_saved = True
            self._said.pop(study.path, None)
        except FedtuneError as error:
            self._say(study.path, f"the attempts at {study.path.name} cannot be written down: {error.code}")

    def _start_next(self, control: Runs, studies: Sequence[StoredStudy]) -> None:
        """Start the first study that may begin; it is seen as active from the next look on."""
        from fedtune.flower.bundle import build

        for study in studies:
            if self.decisions[study.path].state == "queued":
                run = control.start(build(study.plan_text))
                self.decisions[study.path] = Decision("starting")
                logger.info("started %s from round %d: run %d", study.path.name, newest_round(study.path) + 1, run)
                return

    def _note_damage(self, shelf: Shelf) -> None:
        for study in shelf.damaged:
            self._say(study.path, f"{study.path.name} is left out: {study.error.message} [{study.error.code}]")

    def _say(self, about: object, text: str) -> None:
        """Warn once, and again when there is something else to say."""
        if self._said.get(about) != text:
            logger.warning("%s", text)
        self._said[about] = text


def _tell(study: StoredStudy, before: Attempts, judged: Attempts) -> None:
    if judged.failures and judged.run != before.run:
        text = "%s ended after round %d, failure %d in a row: %s"
        logger.warning(
            text,
            study.path.name,
            judged.round,
            judged.failures,
            judged.message,
            extra={"code": judged.code, "hint": judged.hint},
        )


def _foreign(studies: Sequence[StoredStudy], runs: Sequence[RunFacts]) -> list[int]:
    """Return active runs that no study here has: one that was taken away or is damaged must not hold up the others."""
    own = {study.bundle_sha256 for study in studies}
    return [run.number for run in runs if run.status != "finished" and run.bundle_sha256 not in own]


def _stop(control: Runs, run: int) -> None:
    try:
        control.stop(run)
    except FedtuneError as error:
        if error.code not in {"transport.run-finished", "transport.no-run"}:
            raise
    else:
        logger.info("stopped run %d", run)
