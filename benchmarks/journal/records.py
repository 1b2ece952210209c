"""The records of rounds that both halves of the benchmark write."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.journal import entries as e
from fedtune.journal.chain import Chain, moment, public_hex
from fedtune.privacy.accounting import Event

EVENT = Event(1.1, 0.05, 20, 1.0, noise="secure")
PLAN, PAYLOAD = "c" * 64, "e" * 64
START = datetime(2026, 1, 1, tzinfo=UTC)
DATA = e.DataRegistered(name="claims", fingerprint="a" * 64, unit="record", units=10_000, population="b" * 64, joins=())
GRANT = e.ConsentGiven(data=1, fingerprint="a" * 64, purpose="research", epsilon=8.0, expires="2030-01-01T00:00:00Z")


def input_of(number: int) -> str:
    """Return another hash for each round."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def reserve(number: int) -> e.Reserved:
    """Return the RESERVE of a round."""
    event = EVENT.to_dict()
    return e.Reserved(plan=PLAN, round=number, purpose="training", input=input_of(number), data=1, grant=2, event=event)


def story(key: Ed25519PrivateKey, records: int) -> Iterator[e.Entry]:
    """Yield so many entries: a site with one data set, and rounds of RESERVE, COMMIT and SENT."""
    yield e.SiteCreated(site="hospital", public_key=public_hex(key))
    yield DATA
    yield GRANT
    for number in range(3, records):
        begun = number - number % 3
        if number == begun:
            yield reserve(number // 3)
        elif number == begun + 1:
            yield e.Committed(reserved=begun, payload=PAYLOAD, size=1_179_648)
        else:
            yield e.Sent(reserved=begun, again=False)


def write_journal(path: Path, records: int) -> str:
    """Write a journal with a new key, flushed once at the end, and return its public key."""
    key = Ed25519PrivateKey.generate()
    digest = "0" * 64
    with path.open("wb") as file:
        for number, entry in enumerate(story(key, records)):
            line = Chain(number, digest).extend(entry, moment(START + timedelta(seconds=number)), key)
            digest = hashlib.sha256(line).hexdigest()
            file.write(line + b"\n")
    return public_hex(key)
