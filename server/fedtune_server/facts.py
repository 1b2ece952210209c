"""The running totals of a study: what each site spent, what failed, what was measured. Plain data for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedtune.flower.messages import Description
from fedtune.privacy.accounting import Event, epsilon
from fedtune.privacy.plan import PrivacyPlan

Metrics = dict[str, float]


@dataclass(slots=True)
class SiteFacts:
    """One site, as the coordinator knows it: `units` is the site's public count, `events` all it has spent."""

    name: str
    units: int
    data_sha256: str
    events: tuple[Event, ...] = ()
    rounds: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    initial: Metrics = field(default_factory=dict)
    final: Metrics = field(default_factory=dict)

    def epsilon(self, promise: PrivacyPlan) -> float | None:
        """Return ε recomputed from the events that ran, or None without privacy."""
        return None if promise.mode == "off" else epsilon(self.events, promise.delta)

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
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SiteFacts:
        """Read what `to_dict` wrote."""
        return cls(**{**value, "events": tuple(Event.from_dict(event) for event in value["events"])})

    @classmethod
    def of(cls, description: Description) -> SiteFacts:
        """Start from a site's description of itself."""
        return cls(description.site, description.units, description.data_sha256, description.events)


@dataclass(slots=True)
class StudyFacts:
    """Everything the summary needs that is not in the plan."""

    sites: dict[str, SiteFacts] = field(default_factory=dict)
    initial: Metrics = field(default_factory=dict)
    final: Metrics = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0

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
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> StudyFacts:
        """Read what `to_dict` wrote."""
        sites = {site["name"]: SiteFacts.from_dict(site) for site in value["sites"]}
        return cls(**{**value, "sites": sites})
