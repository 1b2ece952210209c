"""Accounts: a unit's true spending is never above that of the account it is charged to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import JournalError
from fedtune.journal.entries import Reserved
from fedtune.journal.spending import Spending
from fedtune.privacy.accounting import Event, merge
from tests.support.site_journals import EVENT, INPUT, PLAN, data


def reserve(number: int, event: Event | None = EVENT, *, plan: str = PLAN, grant: int = 2, round_: int = 1) -> Reserved:
    fields = None if event is None else event.to_dict()
    return Reserved(plan=plan, round=round_, purpose="training", input=INPUT, data=number, grant=grant, event=fields)


def test_data_sets_of_one_name_or_one_content_have_one_account() -> None:
    spending = Spending()
    spending.register(1, data("claims"))
    spending.register(2, data("scans"))
    assert spending.accounts() == {1: (1,), 2: (2,)}
    spending.register(3, data("claims", content="with more rows"))  # rows were added
    spending.register(4, data("renamed", content="scans"))
    assert spending.accounts() == {1: (1, 3), 2: (2, 4)}
    spending.charge(5, reserve(1))
    assert spending.spent(3).events == (EVENT,)
    assert spending.spent(2).events == ()


def test_a_join_makes_one_account_of_several_with_what_all_of_them_have_spent() -> None:
    spending = Spending()
    for number, name in enumerate(["a", "b", "c"], start=1):
        spending.register(number, data(name))
        spending.charge(10 + number, reserve(number, round_=number))
    spending.register(4, data("all", joins=(1, 3)))
    assert spending.accounts() == {1: (1, 3, 4), 2: (2,)}
    assert sum(event.steps for event in spending.spent(4).events) == 2 * EVENT.steps
    spending.register(5, data("b", joins=(4,)))
    assert spending.accounts() == {1: (1, 2, 3, 4, 5)}


def test_a_join_with_what_is_no_data_set_is_refused() -> None:
    with pytest.raises(JournalError, match="no data sets"):
        Spending().register(1, data("claims", joins=(0,)))


def test_a_charge_to_what_is_no_data_set_is_refused() -> None:
    with pytest.raises(JournalError, match="no data set"):
        Spending().charge(1, reserve(7))


def test_spending_is_told_by_plan_and_by_grant_and_plans_in_their_order() -> None:
    spending = Spending()
    spending.register(1, data("claims"))
    spending.charge(5, reserve(1, plan="b" * 64, grant=2))
    spending.charge(6, reserve(1, plan="a" * 64, grant=3))
    spending.charge(7, reserve(1, None, plan="b" * 64, grant=3))
    assert spending.plans(1) == ("b" * 64, "a" * 64)
    assert spending.spent(1, plan="a" * 64).events == (EVENT,)
    assert spending.spent(1, plan="a" * 64).not_private == 0
    assert math.isinf(spending.spent(1, plan="b" * 64).epsilon(1e-5))
    assert spending.spent(1, grant=2).events == (EVENT,)
    assert math.isinf(spending.spent(1).epsilon(1e-5, "rdp"))


@dataclass
class World:
    """Data sets as sets of people, with what each person has truly been in."""

    spending: Spending = field(default_factory=Spending)
    people: dict[int, frozenset[int]] = field(default_factory=dict)
    true: dict[int, list[Event]] = field(default_factory=dict)

    def register(self, name: str, people: frozenset[int]) -> None:
        number = len(self.people) + 1
        joins = tuple(other for other, known in self.people.items() if known & people)
        self.spending.register(number, data(name, content=f"{name} {sorted(people)}", joins=joins))
        self.people[number] = people

    def charge(self, place: int, event: Event, sequence: int) -> None:
        number = place % len(self.people) + 1
        self.spending.charge(sequence, reserve(number, event, round_=sequence))
        for person in self.people[number]:
            self.true.setdefault(person, []).append(event)


EVENTS = st.builds(
    Event, st.sampled_from([0.8, 1.0, 2.0]), st.sampled_from([0.1, 1.0]), st.integers(1, 5), st.just(1.0)
)
PEOPLE = st.frozensets(st.integers(0, 11), min_size=1, max_size=4)
STEPS = st.lists(st.tuples(st.sampled_from("abcd"), PEOPLE) | st.tuples(st.integers(0, 9), EVENTS), max_size=14)


@given(STEPS)
def test_nobody_s_true_spending_is_above_that_of_any_account_they_are_in(steps: list[tuple[object, object]]) -> None:
    world = World()
    for sequence, (what, value) in enumerate(steps, start=100):
        if isinstance(what, str) and isinstance(value, frozenset):
            world.register(what, value)
        elif isinstance(what, int) and isinstance(value, Event) and world.people:
            world.charge(what, value, sequence)
    for number, people in world.people.items():
        account = {event_without(event): event.steps for event in world.spending.spent(number).events}
        for person in people:
            for event in merge(world.true.get(person, [])):
                assert event.steps <= account[event_without(event)]


def event_without(event: Event) -> Event:
    return replace(event, steps=0)
