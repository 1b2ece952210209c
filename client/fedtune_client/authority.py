"""A site's authority over a study: whether it takes part, what each round may spend, and what it has sent.

The order of a round is fixed: consent and caps (no record is read) → RESERVE on disk → training → the update's bytes in
the vault → COMMIT on disk → sending. The journal is held for each record and not for the round, so that consent can be
revoked while a site trains. Knows no model and no message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import rfc8785

from fedtune.config.plan import StudyPlan
from fedtune.errors import ConsentError, LedgerError, PolicyError
from fedtune.journal.entries import PlanAccepted, PlanRefused, Purpose
from fedtune.journal.journal import Clock, Journal, utc_now
from fedtune.journal.ledger import Cap, Charge, Commitment, Ledger, Reservation
from fedtune.journal.spending import Spent
from fedtune.journal.witness import Head, Receipt, require_extends
from fedtune.privacy.accounting import Event
from fedtune.run.files import append_line, cut_torn_line, read_lines
from fedtune_client.admission import Objection, Permit, objections, permit, require_open
from fedtune_client.policy.schema import Policy
from fedtune_client.updates import digest
from fedtune_client.vault import Vault

KEPT = 3  # updates of a study that can be sent again: a coordinator goes back two rounds at most


@dataclass(frozen=True, slots=True)
class Round:
    """What a coordinator asks for: `start` is the hash of what it starts from, `event` what it spends."""

    plan: StudyPlan
    number: int
    purpose: Purpose
    start: str
    event: Event | None


class Authority:
    """One site's journal, vault and adopted policy, asked before anything is read, spent or sent."""

    def __init__(self, journal: Journal, vault: Vault, heads_file: Path, clock: Clock = utc_now) -> None:
        self.journal, self.vault, self._clock = journal, vault, clock
        self._heads_file = heads_file
        self._ledger = Ledger(journal)
        with self.journal:
            self._require_own_receipts()

    def admit(self, plan: StudyPlan) -> None:
        """Accept a plan that policy, approvals, consent and budget allow, or refuse it with every reason.

        Either is written down, once. Error: `policy.refused`, or the reason's own code where there is one reason.
        """
        with self.journal:
            policy, state = self._policy(), self.journal.state
            known = state.accepted.get(plan.sha256)
            if known is not None and known.policy == policy.sha256:
                return
            found = objections(plan, policy, state, self._ledger, self._now())
            if found:
                self._refuse(plan, found)
            self.journal.append(PlanAccepted(plan=plan.sha256, name=plan.name, policy=policy.sha256))

    def permit(self, plan: StudyPlan) -> tuple[Permit, Policy]:
        """Return what a round may use now, and the policy in force.

        Errors: `policy.closed`, `policy.refused` when a policy that was adopted since is against the plan, and those of
        `fedtune_client.admission.permit`.
        """
        with self.journal:
            self.admit(plan)
            policy, now = self._policy(), self._now()
            require_open(policy, now)
            return permit(plan, policy, self.journal.state, now), policy

    def earlier(self, asked: Round) -> Commitment | None:
        """Return what was committed for the same round from the same input, if its bytes are still here."""
        with self.journal:
            charge, _ = self._charge(asked)
            known = self._ledger.earlier(charge)
            return known if known is not None and self.vault.has(self._item(known.sequence)) else None

    def made(self, asked: Round) -> Commitment | None:
        """Return what was committed for the same round from the same input, wherever its bytes are."""
        with self.journal:
            return self._ledger.earlier(self._charge(asked)[0])

    def check(self, asked: Round) -> None:
        """Refuse a round that would pass a cap, before a record is read; as `permit` and `Ledger.check`."""
        with self.journal:
            self._ledger.check(*self._charge(asked))

    def reserve(self, asked: Round, read: str) -> Reservation:
        """Charge a round, on disk before this returns; as `permit` and `Ledger.reserve`.

        `read` is the fingerprint of the records that were read for it: where another grant has come into force since,
        they are not what it covers (`consent.other-data`).
        """
        with self.journal:
            charge, caps = self._charge(asked)
            if self.journal.state.spending.data[charge.data].fingerprint != read:
                raise ConsentError("other-data", "another content was granted meanwhile", hint="ask again")
            return self._ledger.reserve(charge, caps)

    def commit(self, reservation: Reservation, payload: bytes) -> Commitment:
        """Keep the bytes of an update, then commit to them.

        Seeded noise gives the same bytes when it is trained again, so those are not kept.
        """
        with self.journal:
            event = reservation.charge.event
            if event is not None and event.noise == "secure":
                self.vault.put(self._item(reservation.sequence), payload)
            commitment = self._ledger.commit(reservation, digest(payload), len(payload))
            self._drop_old(reservation.charge)
            return commitment

    def stored(self, commitment: Commitment) -> bytes:
        """Return the bytes of an update that was committed before."""
        return self.vault.get(self._item(commitment.sequence))

    def send(self, commitment: Commitment, payload: bytes) -> bytes:
        """Write down that a payload is handed over, and return it; only what was committed can be."""
        if digest(payload) != commitment.payload:
            raise LedgerError("not-committed", "the bytes to send are not those that were committed")
        with self.journal:
            self._ledger.sent(commitment)
        return payload

    def witness(self, receipt: Receipt | None) -> None:
        """Refuse to go on when the journal does not extend a receipt; keep one that witnesses anything new.

        The receipt of nothing but an earlier receipt is no news. Errors: `journal.rolled-back`, `journal.other-site`,
        `journal.forged-head`.
        """
        if receipt is None:
            return
        with self.journal:
            require_extends(self.journal, receipt)
            state = self.journal.state
            if state.witnessed is None or state.witnessed.sequence < min(receipt.head.sequence, state.newest):
                append_line(self._heads_file, json.dumps(receipt.to_dict(), sort_keys=True), durable=False)
                self.journal.append(receipt.entry())

    def head(self) -> Head:
        """Sign where the journal stands."""
        with self.journal:
            return Head.of(self.journal)

    def spent(self, plan: StudyPlan) -> Spent:
        """Return what this site has spent on a study."""
        with self.journal:
            data = self.journal.state.spending.latest(plan.data.name)
            return Spent() if data is None else self._ledger.spent(data, plan=plan.sha256)

    def _charge(self, asked: Round) -> tuple[Charge, tuple[Cap, ...]]:
        allowed, _ = self.permit(asked.plan)
        where = (asked.plan.sha256, asked.number, asked.purpose, asked.start)
        return Charge(*where, allowed.data, allowed.grant, asked.event), allowed.caps

    def _now(self) -> datetime:
        """Return the time, never before the journal's last record: a clock that was set back revives no grant."""
        return max(self._clock(), datetime.fromisoformat(self.journal.chain.time))

    def spent_by(self, reservation: Reservation) -> Spent:
        """Return what this site had spent on the study when a reservation was made."""
        with self.journal:
            return self.journal.state.spending.spent_by(reservation.sequence)

    def _require_own_receipts(self) -> None:
        """Refuse a journal that is older than the newest receipt beside it."""
        cut_torn_line(self._heads_file)
        lines = read_lines(self._heads_file)
        if lines:
            require_extends(self.journal, Receipt.from_dict(lines[-1]))

    def _policy(self) -> Policy:
        adopted = self.journal.state.policy
        if adopted is None:
            raise PolicyError("not-adopted", "the site has adopted no policy", hint="fedtune client policy adopt")
        return _read_policy(adopted.sha256, rfc8785.dumps(adopted.policy).decode())

    def _refuse(self, plan: StudyPlan, found: tuple[Objection, ...]) -> NoReturn:
        codes = tuple(objection.code for objection in found)
        known = self.journal.state.refused.get(plan.sha256)
        if known is None or known.reasons != codes:
            self.journal.append(PlanRefused(plan=plan.sha256, name=plan.name, reasons=codes))
        area, _, slug = codes[0].partition(".")
        text = "; ".join(objection.text for objection in found)
        error = PolicyError("refused", f"the site takes no part in {plan.name}: {text}")
        if len(codes) == 1:
            error.code = f"{area}.{slug}"
        raise error

    def _drop_old(self, charge: Charge) -> None:
        """Remove a study's payloads that nobody can ask for again, those that a kill left uncommitted among them."""
        committed, prefix = self.journal.state.committed, _prefix(charge.purpose, charge.plan)
        held = [name for name in self.vault.names() if name.startswith(prefix)]
        usable = [name for name in held if int(name.removeprefix(prefix)) in committed]
        for name in set(held) - set(usable[-KEPT:]):
            self.vault.remove(name)

    def _item(self, sequence: int) -> str:
        """Return the name under which the vault keeps what a reservation has produced."""
        charged = self.journal.state.spending.reserved[sequence]
        return f"{_prefix(charged.purpose, charged.plan)}{sequence:012d}"


def _prefix(purpose: Purpose, plan: str) -> str:
    return f"{purpose}-{plan[:16]}-"


@lru_cache(maxsize=64)
def _read_policy(sha256: str, text: str) -> Policy:
    policy = Policy.from_canonical(text)
    if policy.sha256 != sha256:
        raise PolicyError("not-canonical", "the adopted policy is not the one that its hash names")
    return policy
