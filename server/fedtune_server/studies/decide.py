"""What comes next for a study: a state machine without I/O and without clock, asked again every second.

    summary is there                                → done
    a person wants it to stop                       → stopping while a run is active, then stopped
    a run of its bundle is active                   → starting, running; a second active run of one bundle is stopped,
                                                      and one whose executor is gone, or before sites were released
    the last attempt failed, and that will pass     → waiting: 5 s, then twice as long each time, up to 5 minutes
    the last attempt failed otherwise               → failed, until a person resumes it
    nothing of that                                 → queued: to be started

1. An attempt is counted once, when its run is first seen to have ended. A run that was stopped is not counted, unless
   because its executor was gone.
2. A newer round than at the failure before, and a person's resume, begin the count anew.
3. What passes is tried for ever. A fault of the coordinator's own is tried five times without a new round, because
   nobody knows whether it passes.
4. A coordinator that was started after a failure does not wait for the rest of its pause.

Flower may have forgotten runs, or remember an older state: what stands on disk decides, and a run that was counted is
not counted again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from fedtune.journal.chain import moment
from fedtune_server.studies.outcome_file import Outcome
from fedtune_server.studies.record import Attempts, StudyRecord

if TYPE_CHECKING:
    from fedtune.flower.submission import RunFacts

State = Literal["queued", "starting", "running", "waiting", "stopping", "stopped", "done", "failed"]

FAULT = "coordinator.internal"
MOST_FAULTS = 5
PASSING = (
    "federation.no-quorum",
    "federation.engine-died",
    "coordinator.stopped",
    "coordinator.lost",
    "envelope.busy",
    "transport.*",
    "*.in-use",
    "*.disk-full",
    "*.unwritable*",
)
_SHORTEST, _LONGEST = 5.0, 300.0
_CODE = re.compile(r"[a-z][a-z-]*\.[a-z][a-z-]*")
_LOGS = "fedtune server logs --role executor"


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything that is known of a study: `runs` are Flower's of its bundle, newest first, `round` the last kept.

    `is_orphaned` says that the process in which a run had begun is gone, which Flower itself finds out a minute later;
    `orphans` are runs that were stopped for that.
    """

    record: StudyRecord
    attempts: Attempts
    runs: Sequence[RunFacts] = ()
    outcome: Outcome | None = None
    round: int = 0
    is_finished: bool = False
    is_orphaned: bool = False
    orphans: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """What a study is doing; `stop` are runs to stop now, `until` is when a waiting one is tried again."""

    state: State
    stop: tuple[int, ...] = ()
    until: datetime | None = None


def judge(seen: Seen, now: datetime) -> Attempts:
    """Return the attempts with the newest run counted in, if it has ended since; otherwise the same object."""
    known = _with_releases(seen)
    ended = next((run for run in seen.runs if run.status == "finished"), None)
    if seen.record.resumed != known.resumed:
        again = {"resumed": seen.record.resumed, "released": known.released, "round": seen.round}
        return Attempts.model_validate(again | _marks(ended, known))
    if ended is None or seen.is_finished or ended.number == known.run or ended.submitted_at <= known.submitted:
        return known
    if ended.outcome == "stopped" and ended.number not in seen.orphans:
        return known.model_copy(update=_marks(ended, known))
    code, message, hint = _failure(ended, seen.outcome)
    before = known if seen.round <= known.round else Attempts()
    changes = {
        "round": max(seen.round, known.round),
        "failures": before.failures + 1,
        "faults": before.faults + (code == FAULT),
        "at": moment(_ended_at(ended, now)),
        "code": code,
        "message": message,
        "hint": hint,
    }
    return known.model_copy(update=changes | _marks(ended, known))


def decide(seen: Seen, now: datetime, up_since: datetime) -> Decision:
    """Return what a study is doing, after `judge`; `up_since` is when this coordinator was started."""
    active = [run for run in seen.runs if run.status != "finished"]
    if seen.is_finished:
        return Decision("done", stop=tuple(run.number for run in active if run.status == "pending"))
    if seen.record.wish == "stop":
        return Decision("stopping" if active else "stopped", stop=tuple(run.number for run in active))
    begun = tuple(run.number for run in active if run.status != "pending")
    if begun and (seen.is_orphaned or len(seen.record.released) > seen.attempts.released):
        return Decision("stopping", stop=begun)
    if active:
        kept = _kept(active)
        state: State = "running" if kept.status == "running" else "starting"
        return Decision(state, stop=tuple(run.number for run in active if run is not kept))
    if seen.attempts.code and is_final(seen.attempts):
        return Decision("failed")
    until = _until(seen.attempts, now, up_since)
    return Decision("queued") if until is None else Decision("waiting", until=until)


def is_passing(code: str) -> bool:
    """Return whether what has ended an attempt passes by itself, or is mended without a word to the coordinator."""
    return any(fnmatchcase(code, pattern) for pattern in PASSING)


def is_final(attempts: Attempts) -> bool:
    """Return whether the last failure ends the study until a person resumes it."""
    if attempts.code == FAULT:
        return attempts.faults >= MOST_FAULTS
    return not is_passing(attempts.code)


def pause(failures: int) -> float:
    """Return the seconds of rest after so many failures in a row: 5, 10, 20, … 300."""
    return min(_SHORTEST * 2.0 ** min(failures - 1, 10), _LONGEST)


def _with_releases(seen: Seen) -> Attempts:
    """Take the record's releases for applied once no run is active that has begun before them."""
    if all(run.status == "finished" for run in seen.runs) and seen.attempts.released != len(seen.record.released):
        return seen.attempts.model_copy(update={"released": len(seen.record.released)})
    return seen.attempts


def _until(attempts: Attempts, now: datetime, up_since: datetime) -> datetime | None:
    """Return when the rest after a failure is over, None when it is; a clock that was set back ends it."""
    if not attempts.failures:
        return None
    at = datetime.fromisoformat(attempts.at)
    until = at + timedelta(seconds=pause(attempts.failures))
    return until if up_since <= at <= now < until else None


def _kept(active: Sequence[RunFacts]) -> RunFacts:
    """Return which of the active runs goes on: one that has begun, else the oldest."""
    begun = [run for run in active if run.status != "pending"]
    return (begun or active)[-1]


def _ended_at(ended: RunFacts, now: datetime) -> datetime:
    """Return when a run ended by Flower's word, and now where that says nothing sensible."""
    try:
        return min(datetime.fromisoformat(ended.finished_at), now)
    except (ValueError, TypeError):
        return now


def _failure(ended: RunFacts, outcome: Outcome | None) -> tuple[str, str, str]:
    """Return code, message and hint of a run that has ended without a summary."""
    if outcome is not None and outcome.run == ended.number and outcome.status == "failed":
        return outcome.code, outcome.message, outcome.hint
    if ended.outcome == "completed":
        return FAULT, "an attempt ended without a summary", _LOGS
    if _CODE.fullmatch(ended.details):
        return ended.details, "the attempt ended, and could write no more down than this code", _LOGS
    return "coordinator.lost", "the executor was lost in the middle of an attempt", _LOGS


def _marks(ended: RunFacts | None, known: Attempts) -> dict[str, object]:
    """Return which run is counted from now on."""
    if ended is None or ended.submitted_at <= known.submitted:
        return {"run": known.run, "submitted": known.submitted}
    return {"run": ended.number, "submitted": ended.submitted_at}
