"""Opening hours follow the clocks on the wall, over midnight and when they are set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from fedtune_client.policy.hours import open_now
from tests.client.policy.conftest import MakePolicy

BERLIN = ZoneInfo("Europe/Berlin")


def hours(*spans: tuple[str, str, str], timezone: str = "Europe/Berlin") -> Any:
    listed = [{"days": days.split(), "opens": opens, "closes": closes} for days, opens, closes in spans]
    return {"timezone": timezone, "spans": listed}


def test_always_is_always_and_no_span_is_never(make_policy: MakePolicy) -> None:
    now = datetime(2025, 1, 1, tzinfo=UTC)
    assert open_now(make_policy(), now)
    assert not open_now(make_policy(opening_hours=hours()), now)


def test_a_time_without_a_zone_is_refused(make_policy: MakePolicy) -> None:
    with pytest.raises(ValueError, match="time zone"):
        open_now(make_policy(), datetime(2025, 1, 1))  # noqa: DTZ001 - that is the point


@pytest.mark.parametrize(
    ("day", "time", "is_open"),
    [
        (3, "21:59", False),  # Friday, 3 January 2025
        (3, "22:00", True),
        (3, "23:59", True),
        (4, "00:00", True),
        (4, "05:59", True),
        (4, "06:00", False),
        (4, "22:30", False),
        (3, "05:00", False),  # the night that began on Thursday
        (5, "05:00", False),
    ],
)
def test_a_span_over_midnight_belongs_to_the_day_on_which_it_opens(
    make_policy: MakePolicy, day: int, time: str, is_open: bool
) -> None:
    policy = make_policy(opening_hours=hours(("fri", "22:00", "06:00")))
    hour, minute = map(int, time.split(":"))
    assert open_now(policy, datetime(2025, 1, day, hour, minute, tzinfo=BERLIN)) is is_open


def test_midnight_ends_a_day_and_a_week_goes_round(make_policy: MakePolicy) -> None:
    whole = make_policy(opening_hours=hours(("sun", "00:00", "24:00")))
    night = make_policy(opening_hours=hours(("sun", "22:00", "00:00")))
    long = make_policy(opening_hours=hours(("sun", "22:00", "02:00")))
    sunday = datetime(2025, 1, 5, 23, 59, 59, tzinfo=BERLIN)
    monday = sunday + timedelta(seconds=1)
    assert [open_now(policy, sunday) for policy in (whole, night, long)] == [True, True, True]
    assert [open_now(policy, monday) for policy in (whole, night, long)] == [False, False, True]


def test_the_zone_of_the_policy_counts_and_not_that_of_the_clock(make_policy: MakePolicy) -> None:
    policy = make_policy(opening_hours=hours(("mon tue wed thu fri sat sun", "09:00", "17:00"), timezone="Asia/Tokyo"))
    moment = datetime(2025, 1, 1, 1, tzinfo=UTC)  # ten o'clock in Tokyo
    assert open_now(policy, moment)
    assert open_now(policy, moment.astimezone(timezone(timedelta(hours=-7))))
    assert not open_now(policy, moment - timedelta(hours=2))


def minutes_open(policy: Any, start: datetime) -> int:
    return sum(open_now(policy, start + timedelta(minutes=minute)) for minute in range(24 * 60))


def test_clocks_that_are_set_shorten_and_lengthen_a_night(make_policy: MakePolicy) -> None:
    policy = make_policy(opening_hours=hours(("sat", "22:00", "06:00")))
    ordinary = minutes_open(policy, datetime(2025, 3, 22, 11, tzinfo=UTC))
    forward = minutes_open(policy, datetime(2025, 3, 29, 11, tzinfo=UTC))
    back = minutes_open(policy, datetime(2025, 10, 25, 11, tzinfo=UTC))
    assert (ordinary, forward, back) == (8 * 60, 7 * 60, 9 * 60)


def test_an_hour_that_does_not_exist_is_never_open_and_one_that_comes_twice_is_open_twice(
    make_policy: MakePolicy,
) -> None:
    policy = make_policy(opening_hours=hours(("sun", "02:00", "03:00")))
    assert minutes_open(policy, datetime(2025, 3, 29, 22, tzinfo=UTC)) == 0
    assert minutes_open(policy, datetime(2025, 10, 25, 20, tzinfo=UTC)) == 120
