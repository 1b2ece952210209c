"""No update without a reservation: the type checker refuses one, and what is forged at run time leads nowhere."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import JournalError, LedgerError
from fedtune.journal.ledger import Commitment, Reservation
from fedtune.training.local import Assignment, event_of_round, train_round
from fedtune_client.authority import Authority, Round
from tests.client.authority.conftest import MakeSite
from tests.support.bench import Bench
from tests.support.runs import ROOT
from tests.support.sites import RealSite

START = "c" * 64
CALL = """
from fedtune.config.plan import StudyPlan
from fedtune.journal.ledger import Reservation
from fedtune.model.layout import AdapterLayout
from fedtune.model.workspace import Workspace
from fedtune.training.local import Assignment, train_round


def run(plan: StudyPlan, workspace: Workspace, layout: AdapterLayout, reservation: Reservation) -> None:
    train_round(plan, workspace, [], {assignment}, (layout, layout))
"""


@pytest.fixture
def authority(site: RealSite) -> Authority:
    opened = site.open()
    return Authority(opened.journal, opened.vault, site.folder.heads_file)


def reserved(authority: Authority, bench: Bench, number: int = 1) -> Reservation:
    asked = Round(bench.plan, number, "training", START, event_of_round(bench.plan))
    with authority.journal as journal:
        fingerprint = next(iter(journal.state.spending.data.values())).fingerprint
    return authority.reserve(asked, fingerprint)


def train(bench: Bench, reservation: Reservation, number: int = 1) -> Any:
    assignment = Assignment("mercy", number, {}, reservation)
    return train_round(bench.plan, bench.workspace, bench.examples, assignment, bench.layouts)


def forged() -> Reservation:
    """What Python cannot forbid: an object of the class that its constructor has not made."""
    return Reservation.__new__(Reservation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ('Assignment("site", 1, {}, reservation)', ""),
        ('Assignment("site", 1, {})', 'Missing positional argument "reservation"'),
        ('Assignment("site", 1, {}, None)', 'incompatible type "None"; expected "Reservation"'),
        ('Assignment("site", 1, {}, 7)', 'incompatible type "int"; expected "Reservation"'),
        ("None", 'incompatible type "None"; expected "Assignment"'),
    ],
)
def test_the_type_checker_accepts_no_training_without_a_reservation(
    tmp_path: Path, assignment: str, complaint: str
) -> None:
    from mypy import api

    file = tmp_path / "snippet.py"
    file.write_text(CALL.replace("{assignment}", assignment))
    out, err, code = api.run(["--config-file", str(ROOT / "pyproject.toml"), str(file)])
    assert err == ""
    assert complaint in out
    assert (code == 0) == (not complaint), out


def test_training_takes_a_reservation_and_says_so_in_its_types() -> None:
    """What the type checker goes by, for runs of the tests without it."""
    assert inspect.signature(train_round).parameters["assignment"].annotation == "Assignment"
    field = inspect.signature(Assignment).parameters["reservation"]
    assert (field.annotation, field.default) == ("Reservation", inspect.Parameter.empty)


@pytest.mark.parametrize("kind", [Reservation, Commitment])
def test_nobody_but_the_ledger_makes_one(kind: Any) -> None:
    with pytest.raises(TypeError, match="only the ledger makes"):
        kind(*[object()] * (len(inspect.signature(kind).parameters)))


def test_control_a_reservation_of_the_ledger_trains(site: RealSite, authority: Authority) -> None:
    bench = site.study.bench
    assert train(bench, reserved(authority, bench)).state
    assert site.charged == 1


def test_a_reservation_serves_one_training_and_cannot_be_copied(site: RealSite, authority: Authority) -> None:
    bench = site.study.bench
    reservation = reserved(authority, bench)
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            copying(reservation)
    train(bench, reservation)
    with pytest.raises(LedgerError) as caught:
        train(bench, reservation)
    assert caught.value.code == "ledger.not-reserved"


def test_a_reservation_serves_its_own_round(site: RealSite, authority: Authority) -> None:
    bench = site.study.bench
    with pytest.raises(LedgerError) as caught:
        train(bench, reserved(authority, bench, 1), number=2)
    assert caught.value.code == "ledger.not-reserved"


def test_a_reservation_of_another_plan_serves_no_training(
    site: RealSite, authority: Authority, make_other_study: Any
) -> None:
    other = make_other_study(study__name="another").bench
    with pytest.raises(LedgerError) as caught:
        train(other, reserved(authority, site.study.bench))
    assert caught.value.code == "ledger.not-reserved"


def test_an_empty_forgery_trains_nothing(site: RealSite) -> None:
    with pytest.raises(AttributeError):
        train(site.study.bench, forged())


def test_a_forgery_with_a_charge_can_neither_be_committed_nor_sent(site: RealSite, authority: Authority) -> None:
    """Code in the client's own process can do anything; what it trained still has no way out through the authority."""
    real = reserved(authority, site.study.bench)
    fake = forged()
    with pytest.raises(AttributeError):
        fake.charge = real.charge  # type: ignore[misc] - its attributes are read-only
    fake._charge, fake._sequence, fake._begun = real.charge, real.sequence + 40, False
    with pytest.raises((JournalError, KeyError)):
        authority.commit(fake, b"an update")
    assert site.entries("commit", "update-sent") == []


def test_only_the_bytes_that_were_committed_can_be_sent(site: RealSite, authority: Authority) -> None:
    commitment = authority.commit(reserved(authority, site.study.bench), b"an update")
    with pytest.raises(LedgerError) as caught:
        authority.send(commitment, b"another")
    assert caught.value.code == "ledger.not-committed"
    assert site.entries("update-sent") == []
    assert authority.send(commitment, b"an update") == b"an update"


def test_a_reservation_is_committed_to_one_payload(site: RealSite, authority: Authority) -> None:
    reservation = reserved(authority, site.study.bench)
    authority.commit(reservation, b"an update")
    with pytest.raises(LedgerError):
        authority.commit(reservation, b"another")
    assert len(site.entries("commit")) == 1


def test_a_site_without_a_reservation_makes_no_update(make_a_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the ledger away from the client: it answers nothing."""
    site = make_a_site()
    monkeypatch.setattr(Authority, "reserve", lambda *arguments: None)
    assert site.refusal(1) == "site.internal"
    assert site.entries("commit", "update-sent") == []
