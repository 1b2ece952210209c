"""What a site has spent, on which data, for which study: a view of the journal's reservations.

Data sets that share a name, a content or any unit have one *account*: what is charged to one is charged to all of them,
so that a unit's true spending is never above its account's (ADR 0015). Knows no cap and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from fedtune.errors import JournalError
from fedtune.journal.entries import DataRegistered, Reserved
from fedtune.privacy.accounting import AccountantName, Event, epsilon, merge

Filter = Callable[[Reserved], bool]
Key = tuple[str, str, int, str, int]  # plan, purpose, round, input, data


@dataclass(frozen=True, slots=True)
class Spent:
    """Mechanism events, merged, and how many rounds without privacy; `epsilon` composes them."""

    events: tuple[Event, ...] = ()
    not_private: int = 0

    def epsilon(self, delta: float, accountant: AccountantName = "pld") -> float:
        """Return ε at δ of everything together; ∞ after a round without privacy."""
        return math.inf if self.not_private else epsilon(self.events, delta, accountant)

    def plus(self, event: Event | None) -> Spent:
        """Return what would be spent after one more event; None is a round without privacy."""
        if event is None:
            return replace(self, not_private=self.not_private + 1)
        return replace(self, events=merge([*self.events, event]))

    @property
    def units(self) -> set[str]:
        """The privacy units that the events are about."""
        return {event.unit for event in self.events}


@dataclass(slots=True)
class Spending:
    """Registrations with their accounts, and every reservation ever made."""

    data: dict[int, DataRegistered] = field(default_factory=dict)
    reserved: dict[int, Reserved] = field(default_factory=dict)
    _account: dict[int, int] = field(default_factory=dict)
    _attempts: dict[Key, list[int]] = field(default_factory=dict)
    _totals: dict[tuple[int, str, int, Event | None], int] = field(default_factory=dict)

    def register(self, sequence: int, entry: DataRegistered) -> None:
        """Add a data set and join its account with those that it may share units with."""
        unknown = set(entry.joins) - set(self.data)
        if unknown:
            raise JournalError("inconsistent", f"a data set joins {sorted(unknown)}, which are no data sets")
        same = {
            other
            for other, known in self.data.items()
            if known.name == entry.name or known.fingerprint == entry.fingerprint
        }
        self.data[sequence] = entry
        joined = {self._account[other] for other in same | set(entry.joins)} | {sequence}
        root = min(joined)
        self._account[sequence] = root
        for other, account in self._account.items():
            if account in joined:
                self._account[other] = root

    def charge(self, sequence: int, entry: Reserved) -> None:
        """Add a reservation."""
        if entry.data not in self.data:
            raise JournalError("inconsistent", f"a round is charged to {entry.data}, which is no data set")
        event = entry.mechanism()
        self.reserved[sequence] = entry
        self._attempts.setdefault(key_of(entry), []).append(sequence)
        total = (entry.data, entry.plan, entry.grant, None if event is None else replace(event, steps=0))
        self._totals[total] = self._totals.get(total, 0) + (1 if event is None else event.steps)

    def account(self, data: int) -> int:
        """Return the account of a data set: the first registration in it."""
        return self._account[data]

    def accounts(self) -> dict[int, tuple[int, ...]]:
        """Return the data sets of each account, in the order of registration."""
        found: dict[int, list[int]] = {}
        for data in sorted(self._account):
            found.setdefault(self._account[data], []).append(data)
        return {account: tuple(members) for account, members in found.items()}

    def plans(self, data: int) -> tuple[str, ...]:
        """Return the plans that were charged to the account of a data set, in the order of their first charge."""
        account = self._account[data]
        return tuple(dict.fromkeys(plan for charged, plan, *_ in self._totals if self._account[charged] == account))

    def attempts(self, key: Key) -> tuple[int, ...]:
        """Return the reservations made for one round from one input, oldest first."""
        return tuple(self._attempts.get(key, ()))

    def latest(self, name: str) -> int | None:
        """Return the newest registration of a data set by its name."""
        return max((number for number, entry in self.data.items() if entry.name == name), default=None)

    def spent(self, data: int, *, plan: str | None = None, grant: int | None = None) -> Spent:
        """Return what the account of a data set has spent: in all, on one plan, or under one grant."""
        account = self._account[data]
        found = [
            (event, amount)
            for (charged, study, permit, event), amount in self._totals.items()
            if self._account[charged] == account and plan in {None, study} and grant in {None, permit}
        ]
        return _total(found)

    def spent_by(self, sequence: int) -> Spent:
        """Return what the account had spent on a reservation's plan when that was made, itself included.

        It is what the site says with the reservation's update, and stays the same however often that is sent.
        """
        last = self.reserved[sequence]
        account = self._account[last.data]
        earlier = (
            entry
            for number, entry in self.reserved.items()
            if number <= sequence and entry.plan == last.plan and self._account[entry.data] == account
        )
        events = [entry.mechanism() for entry in earlier]
        return _total((event, 1 if event is None else event.steps) for event in events)


def key_of(entry: Reserved) -> Key:
    """Return what makes two reservations attempts at the same thing."""
    return entry.plan, entry.purpose, entry.round, entry.input, entry.data


def _total(found: Iterable[tuple[Event | None, int]]) -> Spent:
    parts = list(found)
    events = merge(replace(event, steps=amount) for event, amount in parts if event is not None)
    return Spent(events, sum(amount for event, amount in parts if event is None))
