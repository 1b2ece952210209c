"""The file: what is on disk when a call returns, who may write, and what opening it again gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.errors import FedtuneError, JournalError, LedgerError
from fedtune.journal import entries as e
from fedtune.journal import journal as module
from fedtune.journal.chain import public_hex
from fedtune.journal.journal import Journal
from fedtune.journal.verify import verify
from tests.support.site_journals import (
    EVENT,
    INPUT,
    PAYLOAD,
    PLAN,
    SEEDED,
    Site,
    data,
    digest_of,
    grant,
    rotation,
    run_round,
    twelve,
)

KEY = Ed25519PrivateKey.from_private_bytes(b"\3" * 32)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(FedtuneError) as error:
        action()
    assert error.value.hint, error.value.code
    return error.value.code


def rounds_on_disk(site: Site) -> int:
    """How many rounds the journal charges, read by somebody else."""
    return sum(event.steps for event in verify(site.path).state.spending.spent(1).events) // EVENT.steps


def test_what_append_returned_is_read_by_another_process_at_once(site: Site) -> None:
    with site.create() as journal:
        (record,) = journal.append(data("more"))
        script = (
            "import sys; from pathlib import Path; from fedtune.journal.verify import verify; "
            "print(verify(Path(sys.argv[1])).head)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(site.path)], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == record.digest


def test_a_journal_is_the_same_after_it_is_opened_again(site: Site) -> None:
    twelve(site)
    with site.open() as first:
        chain, state = first.chain, first.state
        assert list(first.lines()) == site.lines()
    with site.open() as again:
        assert (again.chain, again.state, again.cut) == (chain, state, 0)
    assert site.path.stat().st_mode & 0o777 == 0o600


def test_several_entries_are_one_write_and_one_flush(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with site.create() as journal:
        calls: list[str] = []
        write, fsync = os.write, os.fsync
        monkeypatch.setattr(os, "write", lambda *words: (calls.append("write"), write(*words))[1])
        monkeypatch.setattr(os, "fsync", lambda *words: (calls.append("fsync"), fsync(*words))[1])
        journal.append(data("a"), data("b"), data("c"))
        assert calls == ["write", "fsync"]


def test_the_record_is_flushed_before_the_call_that_charges_returns(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.create() as journal:
        flushed: list[int] = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), flushed.append(os.fstat(file).st_size))[0])
        run_round(journal, 1)
        assert flushed[-1] == site.path.stat().st_size
        assert len(flushed) == 3


def test_a_held_journal_is_refused_to_another_process(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    script = (
        "import sys; from pathlib import Path; from fedtune.journal import journal as m; m.PATIENCE = 0.1; "
        "from fedtune.errors import JournalError\n"
        "try: m.Journal.open(Path(sys.argv[1]), None)\n"
        "except JournalError as error: print(error.code)"
    )
    with site.create():
        done = subprocess.run(
            [sys.executable, "-c", script, str(site.path)], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "journal.in-use"
        assert refused(site.open) == "journal.in-use"
        assert verify(site.path).outcome == "intact"  # reading needs no lock
    with site.open():
        """The control: nobody holds it now."""


def test_two_clients_that_take_turns_see_what_the_other_has_charged(site: Site) -> None:
    first = site.create()
    first.close()
    second = site.open()
    second.close()
    for number in range(1, 7):
        with (first, second)[number % 2] as journal:
            run_round(journal, number)
    with first, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PATIENCE", 0.05)
        assert refused(second.__enter__) == "journal.in-use"
    with second:
        assert second.chain == first.chain
        assert sum(event.steps for event in second.state.spending.spent(1).events) == 6 * EVENT.steps


def test_an_inner_hold_ends_with_the_outer_one(site: Site) -> None:
    with site.create() as journal:
        with journal:
            journal.append(data("inner"))
        journal.append(data("outer"))
    assert refused(lambda: journal.append(data("late"))) == "journal.closed"


def test_a_clock_that_was_set_back_a_year_stops_the_site_until_a_person_confirms_it(site: Site) -> None:
    with site.create() as journal:
        run_round(journal, 1)
        site.clock.now -= timedelta(days=365)
        assert refused(lambda: run_round(journal, 2)) == "journal.clock-back"
        assert rounds_on_disk(site) == 1
        journal.append(e.ClockSet(before=journal.chain.time))
        run_round(journal, 2)
    assert verify(site.path).outcome == "intact"
    assert rounds_on_disk(site) == 2


def test_a_clock_that_is_corrected_by_a_minute_does_not_stop_a_site(site: Site) -> None:
    with site.create() as journal:
        last = journal.chain.time
        site.clock.now -= timedelta(minutes=1)
        (record,) = journal.append(data("more"))
        assert record.time == last


def test_what_a_killed_create_left_is_taken_over_and_nothing_else_is(site: Site) -> None:
    first = twelve(site)[0]
    for left in (b"", first[:1], first[:100], first):
        site.path.write_bytes(left)
        if left != first:  # a whole record that lacks its line end is a site
            assert refused(site.open) == "journal.missing"
        with Journal.create(site.path, "hospital", site.key, site.clock) as journal:
            assert journal.chain.length == 1
    for other in (first + b"\n", b"my notes", b"\n", bytes(512)):
        site.path.write_bytes(other)
        assert refused(lambda: Journal.create(site.path, "hospital", KEY)) == "journal.exists"
        assert site.path.read_bytes() == other


def test_a_missing_journal_and_one_of_another_key_are_told_apart(site: Site) -> None:
    assert refused(site.open) == "journal.missing"
    twelve(site)
    assert refused(lambda: Journal.open(site.path, KEY)) == "journal.other-key"
    whole = site.path.read_bytes()
    site.path.write_bytes(whole[:-9])
    assert refused(lambda: Journal.open(site.path, KEY)) == "journal.other-key"
    assert site.path.read_bytes() == whole[:-9], "somebody else's key cut the tail"


def test_a_rotated_key_signs_from_then_on_and_the_old_one_opens_nothing(site: Site) -> None:
    with site.create() as journal:
        journal.rotate(KEY, rotation(site.key, KEY))
        run_round(journal, 1)
    assert refused(site.open) == "journal.other-key"
    with Journal.open(site.path, KEY, site.clock) as journal:
        assert journal.chain.public_key == public_hex(KEY)
    for key in (public_hex(KEY), site.public):  # whichever an auditor was told
        assert verify(site.path, public_key=key).outcome == "intact"


def test_an_entry_that_contradicts_the_journal_never_reaches_the_disk(site: Site) -> None:
    with site.create() as journal:
        before = site.path.read_bytes()
        assert_inconsistent(journal, e.Committed(reserved=2, payload=PAYLOAD, size=1))
        assert site.path.read_bytes() == before
    with site.open() as journal:
        assert journal.chain.length == 3


def assert_inconsistent(journal: Journal, entry: e.Entry) -> None:
    with pytest.raises(JournalError) as error:
        journal.append(entry)
    assert error.value.code == "journal.inconsistent"


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["round", "seeded", "off", "data", "grant", "revoke", "policy", "plan", "rotate", "open", "kill"]
        ),
        st.integers(0, 5),
    ),
    max_size=12,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPERATIONS)
def test_whatever_happens_the_state_after_opening_is_the_state_before(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("site")
    site = Site(folder)
    journal = site.create()
    for name, number in operations:
        if name == "open":
            journal.close()
            journal = site.open()
        elif name == "kill":  # a torn record, as a kill in the middle of a write leaves it
            journal.close()
            site.path.write_bytes(site.path.read_bytes() + b'{"body":{"entry":{"attempt":'[: number + 1])
            journal = site.open()
            assert journal.cut == number + 1
        elif name == "rotate":
            key = Ed25519PrivateKey.generate()
            journal.rotate(key, rotation(site.key, key))
            site.key = key
        else:
            operate(journal, name, number)
        chain, state = journal.chain, journal.state
        journal.close()
        journal = site.open()
        assert (journal.chain, journal.state) == (chain, state)
    journal.close()
    assert verify(site.path, public_key=site.public).outcome == "intact"
    shutil.rmtree(folder)


def operate(journal: Journal, name: str, number: int) -> None:
    state = journal.state
    if name in {"round", "seeded", "off"}:
        event = {"round": EVENT, "seeded": SEEDED, "off": None}[name]
        usable = [found for found in state.grants if found not in state.revoked]
        if usable:
            granted = usable[number % len(usable)]
            try:
                run_round(journal, number, event, grant=granted, data=state.grants[granted].data)
            except LedgerError as error:
                assert error.code == "ledger.not-repeatable"  # noqa: PT017 - or it was not refused at all
    elif name == "data":
        journal.append(data(f"data-{number}", joins=tuple(list(state.spending.data)[: number % 2])))
    elif name == "grant":
        known = [found for found, entry in state.spending.data.items() if entry.fingerprint == digest_of(entry.name)]
        chosen = known[number % len(known)]
        journal.append(grant(chosen, state.spending.data[chosen].name))
    elif name == "revoke":
        journal.append(e.ConsentRevoked(grant=list(state.grants)[number % len(state.grants)], reason="asked"))
    elif name == "policy":
        journal.append(e.PolicyAdopted(sha256=INPUT, policy={"rounds": number}))
    else:
        accepted = e.PlanAccepted(plan=PLAN, name="study", policy=INPUT)
        refusal = e.PlanRefused(plan=PLAN, name="study", reasons=("policy.rounds",))
        journal.append(accepted if number % 2 else refusal)
