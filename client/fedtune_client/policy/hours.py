"""Opening hours: whether a round may start now, by the clocks of the policy's time zone.

A span is wall-clock time: in the night when clocks go forward one over that hour is an hour shorter, when they go back
an hour longer. Knows no plan.
"""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

from fedtune_client.policy.schema import DAYS, Policy, Span


def open_now(policy: Policy, now: datetime) -> bool:
    """Return whether a round may start at `now`, which must know its time zone (ValueError otherwise).

    A span holds from its opening minute until just before its closing minute.
    """
    if now.tzinfo is None:
        raise ValueError("opening hours need a time with its time zone")
    hours = policy.opening_hours
    if hours == "always":
        return True
    local = now.astimezone(ZoneInfo(hours.timezone))
    return any(_holds(span, local) for span in hours.spans)


def _holds(span: Span, local: datetime) -> bool:
    time, today, yesterday = f"{local:%H:%M}", DAYS[local.weekday()], DAYS[local.weekday() - 1]
    if span.opens < span.closes:
        return today in span.days and span.opens <= time < span.closes
    return (today in span.days and time >= span.opens) or (yesterday in span.days and time < span.closes)
