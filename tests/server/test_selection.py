from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fedtune.config.plan import StudyPlan
from fedtune_server.selection import sites_of_round

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.studies import TinyStudy

    MakeStudy = Callable[..., TinyStudy]

NAMES = [f"bank-{index}" for index in range(4)]


def test_without_a_sample_size_every_site_is_asked(make_study: MakeStudy) -> None:
    assert sites_of_round(make_study().plan, NAMES, 1) == NAMES
    assert sites_of_round(make_study("federation.sites_per_round=4").plan, NAMES, 1) == NAMES


def test_the_sample_is_a_function_of_the_plan_that_travels(make_study: MakeStudy) -> None:
    plan = make_study("federation.sites_per_round=2").plan
    again = StudyPlan.from_json(plan.json_text)
    rounds = range(1, 30)
    assert [sites_of_round(plan, NAMES, n) for n in rounds] == [sites_of_round(again, NAMES, n) for n in rounds]


def test_each_site_is_asked_about_equally_often_and_in_site_order(make_study: MakeStudy) -> None:
    plan = make_study("federation.sites_per_round=1").plan
    asked = Counter(sites_of_round(plan, NAMES, number)[0] for number in range(1, 2001))
    assert all(abs(asked[name] - 500) < 100 for name in NAMES)  # five standard deviations
    pairs = make_study("federation.sites_per_round=3").plan
    assert all(
        sites_of_round(pairs, NAMES, number) == sorted(sites_of_round(pairs, NAMES, number)) for number in range(50)
    )
