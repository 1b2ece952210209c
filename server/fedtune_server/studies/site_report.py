"""What a person wants to know of one site in a study: what it does in the round in flight, and what has failed so far.

Knows no file: it is given the study's progress and the site's running totals as they were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

SiteState = Literal["not enrolled", "quarantined", "failed", "answered", "refused", "resting", "asked", "waiting", "-"]


@dataclass(frozen=True, slots=True)
class SiteReport:
    """One site: `state` and `code` of the round in flight, `failures` by their codes over the study.

    `online` is None where nobody knows. `rounds` are its updates that were taken; `quarantine` is why it is not asked
    any more, or empty.
    """

    name: str
    online: bool | None
    state: SiteState
    code: str
    quarantine: str
    rounds: int
    failures: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Standing:
    """A site outside the round in flight; `totals` as `fedtune_server.facts.SiteFacts.to_dict` writes them."""

    name: str
    online: bool | None
    is_enrolled: bool
    refused: str = ""
    totals: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InFlight:
    """The round in flight, 0 while there is none: who has answered, and whose reply has failed why."""

    is_running: bool = False
    number: int = 0
    done: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, progress: Mapping[str, Any]) -> Self:
        """Take it from `progress.json`; a round that has ended is none in flight."""
        number, last = int(progress.get("round") or 0), int(mapping(progress.get("last")).get("number") or 0)
        if not progress.get("running"):
            return cls()
        if number <= last:
            return cls(is_running=True)
        return cls(True, number, frozenset(progress.get("done") or ()), mapping(progress.get("failed")))


def site_report(site: Standing, now: InFlight) -> SiteReport:
    """Return a site as it is now; a failure of the round in flight is counted, which its checkpoint will hold."""
    failures = {str(code): int(count) for code, count in mapping(site.totals.get("failures")).items()}
    if code := now.failed.get(site.name):
        failures[code] = failures.get(code, 0) + 1
    state, code = _state(site, now)
    return SiteReport(
        name=site.name,
        online=site.online,
        state=state,
        code=code,
        quarantine=str(site.totals.get("quarantine") or ""),
        rounds=int(site.totals.get("rounds") or 0),
        failures=failures,
    )


def mapping(value: Any) -> dict[str, Any]:
    """Return a value if it is an object, else an empty one: a file that was read half is no error here."""
    return value if isinstance(value, dict) else {}


def _state(site: Standing, now: InFlight) -> tuple[SiteState, str]:
    """Return the first that holds, the gravest before, and the code of why."""
    rests = int(site.totals.get("rests_until") or 0) >= now.number > 0
    states: list[tuple[bool, SiteState, str]] = [
        (not site.is_enrolled, "not enrolled", ""),
        (bool(site.totals.get("quarantine")), "quarantined", str(site.totals.get("quarantine"))),
        (site.name in now.failed, "failed", now.failed.get(site.name, "")),
        (site.name in now.done, "answered", ""),
        (bool(site.refused), "refused", site.refused),
        (rests, "resting", ""),
        (now.number > 0, "asked", ""),
        (now.is_running, "waiting", ""),
    ]
    return next(((state, code) for holds, state, code in states if holds), ("-", ""))
