"""The privacy ledger: RESERVE the round's worst case, train, COMMIT, send. A view of the journal that charges.

Nothing is refunded: a round that was killed stays charged, and so does one whose update never arrived. An update cannot
exist without a charge, because `train_round` takes a `Reservation` and only this module makes them, after the record is
on disk; each serves one training. A round that is asked again from the same input is answered with what was committed
(`earlier`); with seeded noise it may also be trained again, because it then gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Final, NoReturn, final

from fedtune.errors import LedgerError
from fedtune.journal.entries import Committed, Purpose, Reserved, Sent
from fedtune.journal.journal import Journal
from fedtune.journal.spending import Spent, key_of
from fedtune.privacy.accounting import Event, merge

AGREEMENT = 0.02  # by how much the pessimistic PLD may exceed the RDP bound, which is looser, before a bug is assumed
_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class Charge:
    """What one round of one plan spends at most, on which registered data set and under which grant.

    `input` is the SHA-256 of what the round starts from; `event` is None for a study without privacy.
    """

    plan: str
    round: int
    purpose: Purpose
    input: str
    data: int
    grant: int
    event: Event | None


@dataclass(frozen=True, slots=True)
class Cap:
    """No charge may bring ε at δ above `epsilon`; about one plan or one grant where these are set, else the account.

    `covered` are events that are known to stay within the cap; a history within them is not composed anew.
    """

    what: str
    epsilon: float
    delta: float
    plan: str | None = None
    grant: int | None = None
    covered: tuple[Event, ...] = ()


@final
class Reservation:
    """Proof that a charge is on disk; `begin` gives it up to one training."""

    __slots__ = ("_begun", "_charge", "_sequence")

    def __init__(self, seal: object, charge: Charge, sequence: int) -> None:
        if seal is not _SEAL:
            raise TypeError("only the ledger makes reservations")
        self._charge, self._sequence, self._begun = charge, sequence, False

    @property
    def charge(self) -> Charge:
        """What is on disk."""
        return self._charge

    @property
    def sequence(self) -> int:
        """The number of its record."""
        return self._sequence

    def begin(self, plan: str, number: int, event: Event | None) -> None:
        """Give the reservation up to the training of this round with this event, once.

        Error: `ledger.not-reserved` for a second training, or for anything but what was reserved.
        """
        charged = self._charge
        if self._begun or (charged.plan, charged.round, charged.event) != (plan, number, event):
            raise LedgerError("not-reserved", f"round {number} would spend what the ledger has not reserved for it")
        self._begun = True

    def __reduce__(self) -> NoReturn:
        raise TypeError("a reservation cannot be copied: each serves one training")


@final
class Commitment:
    """Proof that a payload of this hash and size (bytes) was committed; only it may be sent."""

    __slots__ = ("payload", "sequence", "size")

    def __init__(self, seal: object, sequence: int, payload: str, size: int) -> None:
        if seal is not _SEAL:
            raise TypeError("only the ledger makes commitments")
        self.sequence, self.payload, self.size = sequence, payload, size


class Ledger:
    """Charges rounds to a journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def spent(self, data: int, *, plan: str | None = None, grant: int | None = None) -> Spent:
        """Return what the account of a data set has spent: in all, on one plan, or under one grant."""
        return self._journal.state.spending.spent(data, plan=plan, grant=grant)

    def check(self, charge: Charge, caps: Sequence[Cap]) -> None:
        """Refuse a charge that would pass a cap; nothing is written and no record is read.

        Errors: `ledger.over-cap` with what would be spent, `ledger.other-unit`, `ledger.accountants-disagree`.
        """
        if self._repeatable(charge) is None:
            self.require_room(charge.data, (charge.event,), caps)

    def require_room(self, data: int, events: Sequence[Event | None], caps: Sequence[Cap]) -> None:
        """Refuse events that would together pass a cap of a data set, as `check` does for one charge."""
        units = {event.unit for event in events if event is not None} | self.spent(data).units
        if len(units) > 1:
            raise LedgerError(
                "other-unit",
                f"the data set's budget is spent by one privacy unit, and ε by another does not add to it: "
                f"{', '.join(sorted(units))}",
                hint="use the same privacy.unit in every study on this data",
            )
        for cap in caps:
            before = self.spent(data, plan=cap.plan, grant=cap.grant)
            _require_within(cap, reduce(Spent.plus, events, before), before)

    def reserve(self, charge: Charge, caps: Sequence[Cap]) -> Reservation:
        """Charge a round, on disk before this returns, or refuse it as `check` does.

        A seeded round that is tried again from the same input draws the same sample and noise, so it counts once.
        """
        known = self._repeatable(charge)
        if known is not None:
            return Reservation(_SEAL, charge, known)
        self.check(charge, caps)
        (record,) = self._journal.append(_entry(charge))
        return Reservation(_SEAL, charge, record.sequence)

    def commit(self, reservation: Reservation, payload: str, size: int) -> Commitment:
        """Bind a reservation to the hash of what it produced, on disk before this returns.

        A seeded round that was trained again must give the same payload: `ledger.not-repeatable`.
        """
        known = self._journal.state.committed.get(reservation.sequence)
        if known is None:
            self._journal.append(Committed(reserved=reservation.sequence, payload=payload, size=size))
        elif known.payload != payload:
            raise LedgerError(
                "not-repeatable",
                f"round {reservation.charge.round} was committed with another result",
                hint="the site's records, model or number of threads have changed: start a new study",
            )
        return Commitment(_SEAL, reservation.sequence, payload, size)

    def earlier(self, charge: Charge) -> Commitment | None:
        """Return the newest commitment for the same round from the same input, if there is one."""
        state = self._journal.state
        for number in reversed(state.spending.attempts(key_of(_entry(charge)))):
            known = state.committed.get(number)
            if known is not None:
                return Commitment(_SEAL, number, known.payload, known.size)
        return None

    def sent(self, commitment: Commitment) -> None:
        """Write down that a payload is about to be handed over."""
        again = commitment.sequence in self._journal.state.sent
        self._journal.append(Sent(reserved=commitment.sequence, again=again))

    def _repeatable(self, charge: Charge) -> int | None:
        """Return the reservation of the same charge that may be trained again, because it gives the same bits."""
        if charge.event is not None and charge.event.noise == "secure":
            return None
        entry, spending = _entry(charge), self._journal.state.spending
        same = [number for number in spending.attempts(key_of(entry)) if spending.reserved[number] == entry]
        return same[-1] if same else None


def _entry(charge: Charge) -> Reserved:
    return Reserved(
        plan=charge.plan,
        round=charge.round,
        purpose=charge.purpose,
        input=charge.input,
        data=charge.data,
        grant=charge.grant,
        event=None if charge.event is None else charge.event.to_dict(),
    )


def _require_within(cap: Cap, after: Spent, before: Spent) -> None:
    if math.isinf(cap.epsilon) or (not after.not_private and _covered(after.events, cap.covered)):
        return
    spent = composed(after, cap.delta)
    if spent <= cap.epsilon * (1 + 1e-9):
        return
    raise LedgerError(
        "over-cap",
        f"{cap.what} allows ε = {cap.epsilon:g} at δ = {cap.delta:g}; {before.epsilon(cap.delta):.4g} is spent and "
        f"this would make it {spent:.4g}",
        hint="fedtune client budget shows what is left; a round is never partly spent",
    )


def composed(spent: Spent, delta: float) -> float:
    """Return ε by PLD after comparing it with RDP; two accountants that disagree refuse the round."""
    epsilon = spent.epsilon(delta)
    if not math.isfinite(epsilon):
        return epsilon
    bound = spent.epsilon(delta, "rdp")
    if epsilon > bound * (1 + AGREEMENT):
        raise LedgerError(
            "accountants-disagree",
            f"PLD gives ε = {epsilon:.6g}, above the looser RDP bound {bound:.6g}",
            hint="report this: fedtune audit verify FILE --recompute-epsilon shows the events",
        )
    return epsilon


def _covered(events: tuple[Event, ...], covered: tuple[Event, ...]) -> bool:
    """Whether a history has, of each mechanism, at most as many steps as are covered."""
    limits = {replace(event, steps=0): event.steps for event in merge(covered)}
    return all(event.steps <= limits.get(replace(event, steps=0), 0) for event in merge(events))
