"""Sites' journals on disk for tests: one with every common kind of record, and the lines to attack it with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.journal import entries as e
from fedtune.journal.chain import Chain, moment, public_hex, rotation_statement
from fedtune.journal.journal import Journal
from fedtune.journal.ledger import Cap, Charge, Ledger
from fedtune.journal.witness import Head, Receipt
from fedtune.privacy.accounting import Event

START = datetime(2026, 1, 1, tzinfo=UTC)
PLAN, INPUT, PAYLOAD = "c" * 64, "d" * 64, "e" * 64
EVENT = Event(1.0, 0.1, 4, 1.0, noise="secure")
SEEDED = replace(EVENT, noise="seeded")
OPEN = Cap("nothing", float("inf"), 1e-5)


@dataclass
class Clock:
    """A clock that a test sets."""

    now: datetime = START

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now


@dataclass
class Site:
    """A site's folder with its journal's path, its key and a clock."""

    folder: Path
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    clock: Clock = field(default_factory=Clock)

    @property
    def path(self) -> Path:
        return self.folder / "site.journal"

    @property
    def public(self) -> str:
        return public_hex(self.key)

    def create(self) -> Journal:
        """Begin the journal and register one data set (record 1) with a grant (record 2)."""
        journal = Journal.create(self.path, "hospital", self.key, self.clock)
        journal.append(data("claims"), grant(1))
        return journal

    def open(self) -> Journal:
        return Journal.open(self.path, self.key, self.clock)

    def write(self, lines: Sequence[bytes]) -> Path:
        """Replace the journal by these lines."""
        self.path.write_bytes(b"".join(line + b"\n" for line in lines))
        return self.path

    def lines(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n")[:-1]


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def data(name: str, *, content: str = "", joins: tuple[int, ...] = (), unit: str = "record") -> e.DataRegistered:
    fingerprint, population = digest_of(content or name), digest_of(f"{content or name} people")
    return e.DataRegistered(
        name=name, fingerprint=fingerprint, unit=unit, units=100, population=population, joins=joins
    )


def grant(number: int, name: str = "claims") -> e.ConsentGiven:
    return e.ConsentGiven(data=number, fingerprint=digest_of(name), purpose="research", epsilon=3.0, expires=None)


def charge(number: int = 1, event: Event | None = EVENT, **changes: Any) -> Charge:
    """Return the charge of a round to the data set of record 1 under the grant of record 2."""
    return replace(Charge(PLAN, number, "training", INPUT, 1, 2, event), **changes)


def run_round(journal: Journal, number: int, event: Event | None = EVENT, **changes: Any) -> int:
    """Reserve, commit and send one round; return the reservation's number."""
    ledger = Ledger(journal)
    reservation = ledger.reserve(charge(number, event, **changes), [OPEN])
    ledger.sent(ledger.commit(reservation, PAYLOAD, 1000))
    return reservation.sequence


def twelve(site: Site) -> list[bytes]:
    """Write a journal of twelve records, two rounds among them, and return its lines."""
    journal = site.create()
    policy = {"epsilon": 3.0, "rounds": 20}
    journal.append(e.PolicyAdopted(sha256=hashlib.sha256(rfc8785.dumps(policy)).hexdigest(), policy=policy))
    journal.append(e.PlanAccepted(plan=PLAN, name="study", policy="a" * 64))
    run_round(journal, 1)
    journal.append(receipt_of(journal).entry())
    run_round(journal, 2)
    journal.close()
    return site.lines()


WITNESS = Ed25519PrivateKey.from_private_bytes(bytes(32))


def receipt_of(journal: Journal, witness: Ed25519PrivateKey = WITNESS) -> Receipt:
    return Receipt.of(Head.of(journal), witness)


def receipt_at(site: Site, lines: Sequence[bytes], sequence: int, witness: Ed25519PrivateKey = WITNESS) -> Receipt:
    """Return the receipt that a coordinator gave when the journal ended with record `sequence`."""
    from fedtune.journal.witness import HEAD

    first, last = (hashlib.sha256(lines[number]).hexdigest() for number in (0, sequence))
    statement = HEAD + rfc8785.dumps({"digest": last, "sequence": sequence, "site": first})
    head = Head(first, sequence, last, public_hex(site.key), site.key.sign(statement).hex())
    return Receipt.of(head, witness)


def write_receipts(path: Path, *receipts: Receipt) -> Path:
    path.write_text("".join(json.dumps(receipt.to_dict()) + "\n" for receipt in receipts))
    return path


def rotation(old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> e.KeyRotated:
    return e.KeyRotated(public_key=public_hex(new), proof=new.sign(rotation_statement(public_hex(old))).hex())


def chain_of(lines: Sequence[bytes]) -> Chain:
    chain = Chain()
    for line in lines:
        chain, _ = chain.accept(line)
    return chain


def forge(lines: Sequence[bytes], entries: Sequence[e.Entry], key: Ed25519PrivateKey) -> list[bytes]:
    """Continue a chain with whatever entries, signed with whatever key, as an attacker with a good library would."""
    number, digest = len(lines), hashlib.sha256(lines[-1]).hexdigest() if lines else "0" * 64
    made = list(lines)
    for entry in entries:
        chain = Chain(number, digest)
        made.append(chain.extend(entry, moment(START + timedelta(days=1, seconds=number)), key))
        number, digest = number + 1, hashlib.sha256(made[-1]).hexdigest()
    return made


def entries_of(lines: Sequence[bytes]) -> list[e.Entry]:
    chain, found = Chain(), []
    for line in lines:
        chain, record = chain.accept(line)
        found.append(record.entry)
    return found
