"""The running totals of a study: what each site spent, what failed, what was measured. Plain data for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedtune.flower.messages import LACKS_STATE, Description
from fedtune.privacy.accounting import Event, epsilon, merge
from fedtune.privacy.plan import PrivacyPlan

Metrics = dict[str, float]


@dataclass(slots=True)
class SiteFacts:
    """One site, as the coordinator knows it: `units` is the site's public count, `events` all it has spent.

    `rounds` and `evaluations` count its updates and noisy metrics that were accepted. `quarantine` is why it is not
    asked any more (a code, empty while it is), after `offences` replies that no honest site sends, `quarantines` how
    often that has happened; until round `rests_until` it is left out because it was too late. `rank` is its own where
    sites choose theirs. `counted` is the last round whose update was taken; `holds` the last whose outcome the site has
    kept, under `mark`.
    """

    name: str
    units: int
    data_sha256: str
    events: tuple[Event, ...] = ()
    rounds: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    initial: Metrics = field(default_factory=dict)
    final: Metrics = field(default_factory=dict)
    evaluations: int = 0
    offences: int = 0
    quarantine: str = ""
    quarantines: int = 0
    rests_until: int = 0
    rank: int = 0
    counted: int = 0
    holds: int = 0
    mark: str = ""

    def note_offence(self, code: str, most: int) -> None:
        """Count a reply that no honest site sends; after `most` of them the site is quarantined."""
        self.offences += 1
        if self.offences >= most:
            self.quarantine = code
            self.quarantines += 1

    def release(self, times: int) -> None:
        """Let a site out of quarantine, with nothing held against it, unless it was put there more often than that."""
        if times >= self.quarantines:
            self.offences, self.quarantine = 0, ""

    def epsilon(self, promise: PrivacyPlan) -> float | None:
        """Return ε recomputed from the events that ran, or None without privacy."""
        return None if promise.mode == "off" else epsilon(self.events, promise.delta)

    def note_held(self, number: int, mark: str) -> None:
        """Note that the site has kept the outcome of all rounds up to `number`, if it was asked to."""
        if mark:
            self.holds, self.mark = number, mark

    def note_failure(self, code: str) -> None:
        """Count an answer that was missing or refused."""
        self.failures[code] = self.failures.get(code, 0) + 1
        if code == LACKS_STATE:
            self.holds, self.mark = 0, ""

    def note_evaluation(self, cost: Event | None) -> None:
        """Count noisy metrics that came; what the site has not reported of their cost yet is spent all the same."""
        if cost is None:
            return
        self.evaluations += 1
        reported = sum(event.steps for event in self.events if replace(event, steps=0) == replace(cost, steps=0))
        missing = max(0, self.evaluations - reported)
        self.events = merge([*self.events, replace(cost, steps=missing)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "name": self.name,
            "units": self.units,
            "data_sha256": self.data_sha256,
            "events": [event.to_dict() for event in self.events],
            "rounds": self.rounds,
            "failures": self.failures,
            "initial": self.initial,
            "final": self.final,
            "evaluations": self.evaluations,
            "offences": self.offences,
            "quarantine": self.quarantine,
            "quarantines": self.quarantines,
            "rests_until": self.rests_until,
            "rank": self.rank,
            "counted": self.counted,
            "holds": self.holds,
            "mark": self.mark,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SiteFacts:
        """Read what `to_dict` wrote."""
        return cls(**{**value, "events": tuple(Event.from_dict(event) for event in value["events"])})

    @classmethod
    def of(cls, description: Description) -> SiteFacts:
        """Start from a site's description of itself."""
        known = description.site, description.units, description.data_sha256, description.events
        return cls(*known, rank=description.rank)


@dataclass(slots=True)
class StudyFacts:
    """Everything the summary needs that is not in the plan.

    `refused` are sites that the coordinator did not let take part when they introduced themselves, and why (codes).
    `records` is how many held-out records the last metrics count, 0 where sites do not tell.
    """

    sites: dict[str, SiteFacts] = field(default_factory=dict)
    initial: Metrics = field(default_factory=dict)
    final: Metrics = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    refused: dict[str, str] = field(default_factory=dict)
    records: int = 0

    def max_epsilon(self, promise: PrivacyPlan) -> float | None:
        """Return the largest ε any site has spent, or None without privacy."""
        if promise.mode == "off":
            return None
        histories = {site.events for site in self.sites.values()}
        return max((epsilon(events, promise.delta) for events in histories), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "sites": [site.to_dict() for site in self.sites.values()],
            "initial": self.initial,
            "final": self.final,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
            "refused": self.refused,
            "records": self.records,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> StudyFacts:
        """Read what `to_dict` wrote."""
        sites = {site["name"]: SiteFacts.from_dict(site) for site in value["sites"]}
        return cls(**{**value, "sites": sites})
