"""What a journal's records add up to: the site's name, policy, grants, plans, spending and witnessed head.

A view and nothing else: it is rebuilt from the records at every opening, so there is no file beside the journal to lose
or to edit.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fedtune.errors import JournalError
from fedtune.journal import entries as e
from fedtune.journal.chain import Record
from fedtune.journal.spending import Spending


@dataclass(slots=True)
class SiteState:
    """Views of one journal; keys are sequence numbers of records, or hashes of plans.

    `newest` is the last record that says more than that an earlier one was witnessed.
    """

    site: str = ""
    newest: int = 0
    policy: e.PolicyAdopted | None = None
    grants: dict[int, e.ConsentGiven] = field(default_factory=dict)
    revoked: dict[int, e.ConsentRevoked] = field(default_factory=dict)
    records: dict[int, e.RecordsConsented] = field(default_factory=dict)
    approved: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, e.PlanAccepted] = field(default_factory=dict)
    refused: dict[str, e.PlanRefused] = field(default_factory=dict)
    spending: Spending = field(default_factory=Spending)
    committed: dict[int, e.Committed] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    witnessed: e.HeadWitnessed | None = None
    released: dict[str, str] = field(default_factory=dict)

    def apply(self, record: Record) -> None:
        """Take one more record into account.

        Error: `journal.inconsistent` for a record that speaks of another that is not there.
        """
        _APPLY[type(record.entry)](self, record.sequence, record.entry)
        if not isinstance(record.entry, e.HeadWitnessed):
            self.newest = record.sequence

    def grant_in_force(self, data: int, purpose: str, now: datetime) -> int | None:
        """Return the newest grant of a registration for a purpose that is neither revoked nor expired."""
        usable = (
            number
            for number, grant in self.grants.items()
            if grant.data == data and grant.purpose == purpose and number not in self.revoked
            if grant.expires is None or datetime.fromisoformat(grant.expires) > now
        )
        return max(usable, default=None)


def _require(known: Container[int], number: int, what: str) -> None:
    if number not in known:
        raise JournalError("inconsistent", f"a record speaks of {what} {number}, which the journal does not have")


def _created(state: SiteState, _number: int, entry: e.SiteCreated) -> None:
    state.site = entry.site


def _nothing(_state: SiteState, _number: int, _entry: e.Entry) -> None:
    """Change nothing: some records matter to the chain alone."""


def _adopted(state: SiteState, _number: int, entry: e.PolicyAdopted) -> None:
    state.policy = entry


def _registered(state: SiteState, number: int, entry: e.DataRegistered) -> None:
    state.spending.register(number, entry)


def _given(state: SiteState, number: int, entry: e.ConsentGiven) -> None:
    _require(state.spending.data, entry.data, "data set")
    if state.spending.data[entry.data].fingerprint != entry.fingerprint:
        raise JournalError("inconsistent", "a grant names another content than its data set has")
    state.grants[number] = entry


def _revoked(state: SiteState, _number: int, entry: e.ConsentRevoked) -> None:
    _require(state.grants, entry.grant, "grant")
    state.revoked[entry.grant] = entry


def _records(state: SiteState, _number: int, entry: e.RecordsConsented) -> None:
    _require(state.spending.data, entry.data, "data set")
    state.records[entry.data] = entry


def _approved(state: SiteState, _number: int, entry: e.PlanApproved) -> None:
    state.approved[entry.plan] = entry.by


def _accepted(state: SiteState, _number: int, entry: e.PlanAccepted) -> None:
    state.accepted[entry.plan] = entry
    state.refused.pop(entry.plan, None)


def _refused(state: SiteState, _number: int, entry: e.PlanRefused) -> None:
    state.refused[entry.plan] = entry
    state.accepted.pop(entry.plan, None)


def _reserved(state: SiteState, number: int, entry: e.Reserved) -> None:
    _require(state.grants, entry.grant, "grant")
    if state.grants[entry.grant].data != entry.data or entry.grant in state.revoked:
        raise JournalError("inconsistent", f"a round is charged under grant {entry.grant}, which does not cover it")
    state.spending.charge(number, entry)


def _committed(state: SiteState, _number: int, entry: e.Committed) -> None:
    _require(state.spending.reserved, entry.reserved, "reservation")
    if entry.reserved in state.committed:
        raise JournalError("inconsistent", f"reservation {entry.reserved} is committed twice")
    state.committed[entry.reserved] = entry


def _sent(state: SiteState, _number: int, entry: e.Sent) -> None:
    _require(state.committed, entry.reserved, "commitment")
    state.sent[entry.reserved] = state.sent.get(entry.reserved, 0) + 1


def _witnessed(state: SiteState, _number: int, entry: e.HeadWitnessed) -> None:
    state.witnessed = entry


def _released(state: SiteState, _number: int, entry: e.Released) -> None:
    state.released[entry.plan] = entry.manifest


_APPLY: dict[type[e.Entry], Callable[[SiteState, int, Any], None]] = {
    e.SiteCreated: _created,
    e.KeyRotated: _nothing,
    e.PolicyAdopted: _adopted,
    e.DataRegistered: _registered,
    e.ConsentGiven: _given,
    e.ConsentRevoked: _revoked,
    e.RecordsConsented: _records,
    e.PlanApproved: _approved,
    e.PlanAccepted: _accepted,
    e.PlanRefused: _refused,
    e.Reserved: _reserved,
    e.Committed: _committed,
    e.Sent: _sent,
    e.HeadWitnessed: _witnessed,
    e.Released: _released,
    e.ClockSet: _nothing,
}
