"""RESERVE before anything is spent: what a ledger lets through, and that nothing gets round it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FedtuneError, LedgerError
from fedtune.journal import entries as e
from fedtune.journal import ledger as module
from fedtune.journal.journal import Journal
from fedtune.journal.ledger import Cap, Charge, Commitment, Ledger, Reservation, composed
from fedtune.journal.spending import Spent
from fedtune.journal.verify import verify
from fedtune.privacy.accounting import Event, epsilon
from tests.support.site_journals import EVENT, OPEN, PAYLOAD, PLAN, SEEDED, Site, charge, data, grant

DELTA = 1e-5


@pytest.fixture
def journal(site: Site) -> Any:
    with site.create() as opened:
        yield opened


@pytest.fixture
def ledger(journal: Journal) -> Ledger:
    return Ledger(journal)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(FedtuneError) as error:
        action()
    return error.value.code


def test_a_reservation_is_on_disk_when_it_is_returned_and_serves_one_training(site: Site, ledger: Ledger) -> None:
    reservation = ledger.reserve(charge(1), [OPEN])
    assert verify(site.path).state.spending.spent(1).events == (EVENT,)
    assert (reservation.sequence, reservation.charge) == (3, charge(1))
    reservation.begin(PLAN, 1, EVENT)
    assert refused(lambda: reservation.begin(PLAN, 1, EVENT)) == "ledger.not-reserved"


@pytest.mark.parametrize(
    ("plan", "number", "event"),
    [
        ("a" * 64, 1, EVENT),
        (PLAN, 2, EVENT),
        (PLAN, 1, replace(EVENT, steps=5)),
        (PLAN, 1, replace(EVENT, noise_multiplier=0.5)),
        (PLAN, 1, replace(EVENT, clip_norm=2.0)),
        (PLAN, 1, replace(EVENT, unit="patient")),
        (PLAN, 1, SEEDED),
        (PLAN, 1, None),
    ],
)
def test_a_reservation_serves_nothing_but_what_was_reserved(
    ledger: Ledger, plan: str, number: int, event: Event | None
) -> None:
    reservation = ledger.reserve(charge(1), [OPEN])
    assert refused(lambda: reservation.begin(plan, number, event)) == "ledger.not-reserved"
    reservation.begin(PLAN, 1, EVENT)  # the control


def test_nobody_but_the_ledger_makes_reservations_and_commitments(ledger: Ledger) -> None:
    for forge in (
        lambda: Reservation(object(), charge(1), 3),
        lambda: Reservation(None, charge(1), 3),
        lambda: Commitment(object(), 3, PAYLOAD, 1),
    ):
        with pytest.raises(TypeError, match="only the ledger"):
            forge()
    empty = object.__new__(Reservation)  # Python lets everybody make an object, but not one that can be used
    with pytest.raises(AttributeError):
        empty.begin(PLAN, 1, EVENT)


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_reservation_is_not_copied(ledger: Ledger, copying: Callable[[object], object]) -> None:
    reservation = ledger.reserve(charge(1), [OPEN])
    with pytest.raises(TypeError, match="cannot be copied"):
        copying(reservation)


def test_every_attempt_with_secure_noise_is_charged(ledger: Ledger) -> None:
    numbers = [ledger.reserve(charge(1), [OPEN]).sequence for _ in range(3)]
    assert numbers == [3, 4, 5]
    assert ledger.spent(1).events == (replace(EVENT, steps=12),)


def test_a_seeded_attempt_from_the_same_input_is_charged_once_also_after_opening_again(
    site: Site, journal: Journal, ledger: Ledger
) -> None:
    first = ledger.reserve(charge(1, SEEDED), [OPEN])
    second = ledger.reserve(charge(1, SEEDED), [OPEN])
    first.begin(PLAN, 1, SEEDED)
    second.begin(PLAN, 1, SEEDED)  # trained again: the same bits
    journal.close()
    with site.open() as again:
        assert Ledger(again).reserve(charge(1, SEEDED), [OPEN]).sequence == first.sequence == second.sequence
        assert Ledger(again).spent(1).events == (SEEDED,)


@pytest.mark.parametrize(
    "changes",
    [
        {"input": "0" * 64},
        {"round": 2},
        {"plan": "0" * 64},
        {"purpose": "metrics"},
        {"event": replace(SEEDED, steps=8)},
    ],
)
def test_a_seeded_attempt_at_anything_else_is_charged_again(ledger: Ledger, changes: dict[str, Any]) -> None:
    ledger.reserve(charge(1, SEEDED), [OPEN])
    ledger.reserve(replace(charge(1, SEEDED), **changes), [OPEN])
    assert sum(event.steps for event in ledger.spent(1).events) >= 8


def test_a_round_that_is_asked_again_is_answered_with_what_was_committed(ledger: Ledger) -> None:
    assert ledger.earlier(charge(1)) is None
    first = ledger.reserve(charge(1), [OPEN])
    assert ledger.earlier(charge(1)) is None, "reserved and killed: nothing to send"
    ledger.commit(first, PAYLOAD, 10)
    known = ledger.earlier(charge(1))
    assert known is not None
    assert (known.sequence, known.payload, known.size) == (first.sequence, PAYLOAD, 10)
    ledger.sent(known)
    ledger.sent(known)
    for other in (charge(2), charge(1, input="0" * 64), charge(1, plan="0" * 64), charge(1, purpose="metrics")):
        assert ledger.earlier(other) is None


def test_the_newest_commitment_of_a_round_is_the_one_to_send(ledger: Ledger) -> None:
    for payload in ("a" * 64, "b" * 64):
        ledger.commit(ledger.reserve(charge(1), [OPEN]), payload, 1)
    ledger.reserve(charge(1), [OPEN])
    known = ledger.earlier(charge(1))
    assert known is not None
    assert known.payload == "b" * 64


def test_a_seeded_round_that_gives_another_result_is_not_sent(journal: Journal, ledger: Ledger) -> None:
    reservation = ledger.reserve(charge(1, SEEDED), [OPEN])
    ledger.commit(reservation, PAYLOAD, 10)
    length = journal.chain.length
    assert ledger.commit(ledger.reserve(charge(1, SEEDED), [OPEN]), PAYLOAD, 10).sequence == reservation.sequence
    assert refused(lambda: ledger.commit(reservation, "0" * 64, 10)) == "ledger.not-repeatable"
    assert journal.chain.length == length


def test_what_was_sent_again_is_said_to_be(journal: Journal, ledger: Ledger) -> None:
    known = ledger.commit(ledger.reserve(charge(1), [OPEN]), PAYLOAD, 1)
    ledger.sent(known)
    ledger.sent(known)
    journal.close()
    assert [b'"again":true' in line for line in journal.lines()][-2:] == [False, True]


# Caps


def rounds_until_refused(ledger: Ledger, caps: Sequence[Cap], **changes: Any) -> int:
    for number in range(1, 100):
        try:
            ledger.reserve(charge(number, **changes), caps)
        except LedgerError as error:
            assert error.code == "ledger.over-cap"  # noqa: PT017 - or it would not have been refused
            return number - 1
    raise AssertionError("never refused")


def most(cap: float, step: Event = EVENT) -> int:
    """How many rounds of `step` stay within the cap."""
    return max(n for n in range(40) if epsilon([replace(step, steps=step.steps * n)], DELTA) <= cap)


@pytest.mark.parametrize("cap", [2.5, 3.0, 4.5])
def test_rounds_are_charged_up_to_the_cap_and_not_beyond(ledger: Ledger, journal: Journal, cap: float) -> None:
    assert rounds_until_refused(ledger, [Cap("the policy", cap, DELTA)]) == most(cap) > 0
    assert ledger.spent(1).epsilon(DELTA) <= cap
    length = journal.chain.length
    assert refused(lambda: ledger.check(charge(99), [Cap("the policy", cap, DELTA)])) == "ledger.over-cap"
    assert journal.chain.length == length


def test_a_study_a_grant_and_a_lifetime_have_caps_of_their_own(journal: Journal, ledger: Ledger) -> None:
    journal.append(grant(1))  # record 3, beside record 2
    study = Cap("the study", 2.5, DELTA, plan=PLAN)
    assert rounds_until_refused(ledger, [study]) == most(2.5)
    other = {"plan": "a" * 64}
    ledger.reserve(charge(1, **other), [replace(study, plan="a" * 64)])  # another study has its own
    permitted = Cap("the grant", 2.5, DELTA, grant=2)
    assert refused(lambda: ledger.reserve(charge(2, **other), [permitted])) == "ledger.over-cap"
    ledger.reserve(charge(2, grant=3, **other), [replace(permitted, grant=3)])
    lifetime = Cap("the lifetime", 2.5, DELTA)
    assert refused(lambda: ledger.reserve(charge(3, grant=3, **other), [lifetime])) == "ledger.over-cap"
    assert refused(lambda: ledger.reserve(charge(3, grant=3, **other), [OPEN, lifetime])) == "ledger.over-cap"


def test_an_account_s_cap_counts_every_data_set_that_shares_a_unit(journal: Journal, ledger: Ledger) -> None:
    cap = Cap("the lifetime", 3.0, DELTA)
    spent = rounds_until_refused(ledger, [cap])
    journal.append(data("renamed", content="claims"))
    number = journal.chain.length - 1
    granted = grant(number).model_copy(update={"data": number})
    journal.append(granted)
    renamed = {"data": number, "grant": number + 1}
    assert refused(lambda: ledger.reserve(charge(1, **renamed), [cap])) == "ledger.over-cap"
    journal.append(data("strangers"), e.ConsentGiven(**{**grant(1, "strangers").model_dump(), "data": number + 2}))
    strangers = {"data": number + 2, "grant": number + 3}
    assert rounds_until_refused(ledger, [cap], **strangers) == spent  # the control: others have their own budget


def test_a_round_without_privacy_is_over_every_cap_and_so_is_all_that_follows(ledger: Ledger) -> None:
    cap = Cap("the policy", 1e6, DELTA)
    assert refused(lambda: ledger.reserve(charge(1, None), [cap])) == "ledger.over-cap"
    ledger.reserve(charge(1, None), [OPEN])
    assert math.isinf(ledger.spent(1).epsilon(DELTA))
    assert refused(lambda: ledger.reserve(charge(2), [cap])) == "ledger.over-cap"
    assert refused(lambda: ledger.reserve(charge(2), [Cap("the policy", math.nan, DELTA)])) == "ledger.over-cap"


def test_a_cap_that_covers_the_plan_s_events_lets_them_through_and_nothing_more(ledger: Ledger) -> None:
    covered = (replace(EVENT, steps=12),)
    cap = Cap("the study", epsilon(covered, DELTA), DELTA, covered=covered)
    assert rounds_until_refused(ledger, [cap]) == 3


HISTORY = st.lists(
    st.builds(Event, st.sampled_from([0.7, 1.0, 3.0]), st.sampled_from([0.05, 1.0]), st.integers(0, 6), st.just(1.0)),
    max_size=4,
)


@settings(max_examples=60)
@given(history=HISTORY, covered=HISTORY, last=HISTORY.filter(bool))
def test_what_is_covered_is_within_the_cap_when_all_of_it_is_composed(
    history: list[Event], covered: list[Event], last: list[Event]
) -> None:
    """The shortcut and the full computation decide alike: a part of what is covered spends no more than all of it."""
    after = Spent(tuple(history)).plus(last[0])
    if module._covered(after.events, tuple(covered)):
        assert composed(after, DELTA) <= epsilon(covered, DELTA) * (1 + 1e-3) + 1e-5
    assert module._covered(after.events, after.events)
    more = replace(last[0], steps=last[0].steps + 1)
    assert not module._covered(Spent(after.events).plus(more).events, after.events)


def test_another_privacy_unit_is_refused_before_anything_is_charged(journal: Journal, ledger: Ledger) -> None:
    ledger.reserve(charge(1), [OPEN])
    length = journal.chain.length
    patient = replace(EVENT, unit="patient")
    assert refused(lambda: ledger.reserve(charge(2, patient), [OPEN])) == "ledger.other-unit"
    assert journal.chain.length == length
    ledger.reserve(charge(2), [OPEN])


def test_a_pld_that_claims_more_than_the_looser_bound_stops_the_round(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted bug in either accountant: the two must not drift apart unseen."""
    honest = Spent.epsilon
    for planted, factor in (("pld", 2.0), ("rdp", 0.5)):

        def wrong(self: Spent, delta: float, accountant: str = "pld", at: str = planted, by: float = factor) -> float:
            return honest(self, delta, accountant) * (by if accountant == at else 1.0)  # type: ignore[arg-type]

        monkeypatch.setattr(Spent, "epsilon", wrong)
        assert refused(lambda: ledger.reserve(charge(1), [Cap("x", 100.0, DELTA)])) == "ledger.accountants-disagree"
    monkeypatch.setattr(Spent, "epsilon", honest)
    ledger.reserve(charge(1), [Cap("x", 100.0, DELTA)])  # the control


# Three studies


STUDIES = [(PLAN, 1.1, 0.05, 5), ("a" * 64, 0.9, 0.02, 8), ("b" * 64, 1.5, 0.1, 3)]  # plan, σ, q, steps a round
ROUNDS = 20


def independent_epsilon() -> float:
    """ε of the three studies by dp-accounting alone, on the grid that fedtune documents."""
    mechanisms = sorted((sigma, rate, steps * ROUNDS) for _, sigma, rate, steps in STUDIES)
    events = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps
            )
            for sigma, rate, steps in mechanisms
        ]
    )
    rdp = RdpAccountant(orders=(2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)).compose(events).get_epsilon(DELTA)
    steps = sum(steps for _, _, steps in mechanisms)
    grid = max(1e-5, min(math.sqrt(1e-4 * rdp / steps), 1e-3 * rdp))
    return float(PLDAccountant(value_discretization_interval=grid).compose(events).get_epsilon(DELTA))


def test_three_studies_of_twenty_rounds_add_up_as_an_independent_computation_says(site: Site) -> None:
    expected = independent_epsilon()
    cap = Cap("the lifetime", expected * (1 + 1e-9), DELTA)
    with site.create() as journal:
        ledger = Ledger(journal)
        for number in range(1, ROUNDS + 1):  # interleaved, as studies at one time are
            for plan, sigma, rate, steps in STUDIES:
                event = Event(sigma, rate, steps, 1.0, noise="secure")
                ledger.reserve(charge(number, event, plan=plan), [cap] if number > 18 else [OPEN])
        assert ledger.spent(1).epsilon(DELTA) == pytest.approx(expected, rel=1e-9, abs=0)
        fourth = charge(1, Event(2.0, 0.01, 1, 1.0, noise="secure"), plan="f" * 64)
        assert refused(lambda: ledger.reserve(fourth, [cap])) == "ledger.over-cap"
    only = Site(site.folder / "only", site.key, site.clock)
    only.folder.mkdir()
    site.path.rename(only.path)  # nothing but the journal
    with only.open() as journal:
        assert Ledger(journal).spent(1).epsilon(DELTA) == pytest.approx(expected, rel=1e-9, abs=0)
        assert refused(lambda: Ledger(journal).reserve(fourth, [cap])) == "ledger.over-cap"
        Ledger(journal).reserve(fourth, [OPEN])  # the control: without a cap it would be charged


def test_a_charge_is_written_with_all_that_an_auditor_needs_to_compose_it(journal: Journal, ledger: Ledger) -> None:
    ledger.reserve(charge(1), [OPEN])
    entry = journal.state.spending.reserved[3]
    assert entry.mechanism() == EVENT
    assert entry.event == EVENT.to_dict()
    assert isinstance(charge(1), Charge)
