"""Reservations for tests of training: charged, as every other, to a journal on disk."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.journal.entries import ConsentGiven, DataRegistered
from fedtune.journal.journal import Journal
from fedtune.journal.ledger import Charge, Ledger, Reservation
from fedtune.training.local import event_of_round

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedtune.config.plan import StudyPlan
    from fedtune.privacy.accounting import Event

DATA = DataRegistered(name="data", fingerprint="a" * 64, unit="record", units=100, population="b" * 64, joins=())
GRANT = ConsentGiven(data=1, fingerprint="a" * 64, purpose="research", epsilon=None, expires=None)


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Open the ledger of a new site with one data set (record 1) and a grant for it (record 2)."""
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal.create(Path(folder) / "site.journal", "site", Ed25519PrivateKey.generate())
        journal.append(DATA, GRANT)
        try:
            yield Ledger(journal)
        finally:
            journal.close()


def charge_of(plan: StudyPlan, number: int, event: Event | None, start: str = "c" * 64) -> Charge:
    """Return the charge of one round on that data set."""
    return Charge(plan.sha256, number, "training", start, 1, 2, event)


def reserved(plan: StudyPlan, number: int) -> Reservation:
    """Return a reservation of what a round of a plan costs."""
    with ledger() as open_ledger:
        return open_ledger.reserve(charge_of(plan, number, event_of_round(plan)), ())
