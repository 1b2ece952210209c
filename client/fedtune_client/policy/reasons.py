"""A reason to refuse a plan, what it is judged from, and the comparisons of which every rule is made.

A comparison refuses what it cannot compare (NaN). Knows no single rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedtune.config.plan import StudyPlan
from fedtune_client.policy.schema import DataPolicy, Policy

_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a plan is outside: a stable code that may leave the site, what the plan has, what the policy allows."""

    code: str
    found: str
    allowed: str
    text: str


@dataclass(frozen=True, slots=True)
class Case:
    """A plan before a policy, and what the site knows besides."""

    plan: StudyPlan
    policy: Policy
    approved: bool
    units: int | None

    @property
    def private(self) -> bool:
        """Whether the plan promises anything; where it may run without, its numbers of privacy mean nothing."""
        return self.plan.promise.mode == "dp"

    @property
    def data(self) -> DataPolicy | None:
        """What the policy says of the plan's data set; None when it does not name it, which is one reason, not five."""
        return self.policy.data.get(self.plan.data.name)


def reason(slug: str, what: str, found: str, allowed: str) -> Reason:
    """Return the reason `policy.slug`; what is found is cut where it is long, because a coordinator wrote it."""
    found = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…"
    return Reason(f"policy.{slug}", found, allowed, f"{what} is {found}; the site's policy allows {allowed}")


def at_most(slug: str, what: str, found: float, most: float, of: str = "") -> Reason | None:
    """Refuse what is above `most`, and what cannot be compared (NaN)."""
    allowed = " ".join(["at most", number(most), of]).strip()
    return None if found <= most else reason(slug, what, number(found), allowed)


def at_least(slug: str, what: str, found: float, least: float) -> Reason | None:
    """Refuse what is below `least`, and what cannot be compared."""
    return None if found >= least else reason(slug, what, number(found), f"at least {number(least)}")


def one_of(slug: str, what: str, found: str, allowed: Iterable[str]) -> Reason | None:
    """Refuse what is not one of those allowed."""
    choices = tuple(allowed)
    return None if found in choices else reason(slug, what, found, listed(choices))


def listed(values: Iterable[str]) -> str:
    """Join values for people; `none` where there are none."""
    return ", ".join(values) or "none"


def number(value: float) -> str:
    """Write a number so that one just outside does not look like the limit."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.12g}"
