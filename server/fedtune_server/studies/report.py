"""What a person wants to know of a study: what it does, how far it is, what it has spent, and who fails why.

Put together from the study's own files, Flower's runs and nodes where a coordinator is up, and who is enrolled. Decides
nothing that the conductor does not decide by the same rules. Knows no terminal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fedtune.errors import FedtuneError
from fedtune_server.studies.decide import Decision, Seen, decide, judge
from fedtune_server.studies.newest import newest_facts, newest_round
from fedtune_server.studies.outcome_file import read_outcome
from fedtune_server.studies.progress_file import read_progress
from fedtune_server.studies.record import Attempts, read_attempts
from fedtune_server.studies.site_report import InFlight, SiteReport, Standing, mapping, site_report
from fedtune_server.studies.store import StoredStudy

if TYPE_CHECKING:
    from fedtune.flower.submission import RunFacts


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known outside a study's folder; `runs` and `online` are None where no coordinator is up.

    `online` are the sites with a node that is connected, `enrolled` those that are not revoked.
    """

    now: datetime
    enrolled: Collection[str]
    runs: Sequence[RunFacts] | None = None
    online: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The last attempt's end: how often in a row, and when it is tried again (None: when a person resumes it)."""

    code: str
    message: str
    hint: str
    at: str
    failures: int
    again: str | None


@dataclass(frozen=True, slots=True)
class StudyReport:
    """One study; ε is the largest of any site's so far, None without privacy or before the first round."""

    name: str
    plan_sha256: str
    folder: str
    submitted: str
    state: str
    round: int
    rounds: int
    in_round: int | None
    metric_name: str
    metric: float | None
    epsilon: float | None
    epsilon_planned: float | None
    seconds_left: float | None
    failure: Failure | None
    sites: tuple[SiteReport, ...]


def report(study: StoredStudy, around: Surroundings) -> StudyReport:
    """Return a study as it is now."""
    plan, progress = study.plan, read_progress(study.path)
    attempts, decision, kept = _decided(study, around)
    last = mapping(progress.get("last"))
    runs = decision.state == "running"
    return StudyReport(
        name=study.record.name,
        plan_sha256=study.record.plan_sha256,
        folder=str(study.path),
        submitted=study.record.submitted,
        state=decision.state,
        round=kept,
        rounds=plan.federation.rounds,
        in_round=progress.get("round") if runs and progress.get("running") else None,
        metric_name="accuracy" if plan.task.kind == "classification" else "loss",
        metric=last.get("metric"),
        epsilon=last.get("epsilon_spent"),
        epsilon_planned=plan.promise.epsilon if plan.promise.mode == "dp" else None,
        seconds_left=_seconds_left(progress, plan.federation.rounds - kept) if runs else None,
        failure=_failure(attempts, decision, kept),
        sites=_sites(study, around, progress if runs else {}),
    )


def _decided(study: StoredStudy, around: Surroundings) -> tuple[Attempts, Decision, int]:
    """Judge and decide as the conductor does; without one, a study that would wait is queued."""
    try:
        attempts = read_attempts(study.path)
    except FedtuneError:
        attempts = Attempts()
    kept = newest_round(study.path)
    seen = Seen(study.record, attempts, study.own(around.runs or ()), read_outcome(study.path), kept, study.is_finished)
    judged = judge(seen, around.now)
    up_since = around.now if around.runs is None else datetime.fromtimestamp(0, UTC)
    decision = decide(replace(seen, attempts=judged), around.now, up_since)
    return judged, decision, kept


def _failure(attempts: Attempts, decision: Decision, kept: int) -> Failure | None:
    """Return the last failure, unless a round was kept after it or nobody wants the study to go on."""
    if not attempts.failures or decision.state in {"done", "stopped"} or kept > attempts.round:
        return None
    again = None if decision.until is None else decision.until.isoformat(timespec="seconds")
    return Failure(attempts.code, attempts.message, attempts.hint, attempts.at, attempts.failures, again)


def _sites(study: StoredStudy, around: Surroundings, progress: Mapping[str, Any]) -> tuple[SiteReport, ...]:
    facts, round_ = newest_facts(study.path), InFlight.of(progress)
    known = {str(site.get("name")): site for site in facts.get("sites", ()) if isinstance(site, dict)}
    refused = mapping(facts.get("refused"))
    found = []
    for name in study.record.sites:
        online = None if around.online is None else name in around.online
        standing = Standing(name, online, name in around.enrolled, str(refused.get(name, "")), known.get(name, {}))
        found.append(site_report(standing, round_))
    return tuple(found)


def _seconds_left(progress: Mapping[str, Any], rounds: int) -> float | None:
    recent = progress.get("recent") or ()
    return sum(recent) / len(recent) * rounds if recent else None
