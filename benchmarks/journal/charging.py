"""Charges a second: the ledger beside a database and a plain file, taking turns in one process on one disk.

Each operation returns when its bytes are on disk. The peers write the bytes that the ledger wrote, without computing,
signing, chaining or checking anything.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.journal.records import DATA, EVENT, GRANT, PAYLOAD, PLAN, input_of
from fedtune.journal.journal import Journal
from fedtune.journal.ledger import Cap, Charge, Ledger

COVERED = (replace(EVENT, steps=10**9),)
CAPS = [Cap("the policy", 1e3, 1e-5, covered=COVERED)]  # as a plan that was accepted covers its own rounds
SIZES = {"reserve": 670, "round": 670 + 420 + 350}  # bytes that the peers write; about what the ledger writes


def measured(folder: Path, turns: int, batch: int) -> dict[str, dict[str, float]]:
    """Return, for each peer, how many operations it finished a second (median of turns, with quartiles)."""
    peers = _peers(folder)
    rates: dict[str, list[float]] = {name: [] for name in peers}
    names = list(peers)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            for _ in range(batch):
                peers[name]()
            if turn:  # the first warms up
                rates[name].append(batch / (time.perf_counter() - started))
    return {name: _summary(found) for name, found in rates.items()}


def composing(folder: Path, rounds: int) -> float:
    """Return the seconds of a RESERVE whose ε is composed, by PLD and by RDP, because no plan covers it (median)."""
    charge = _ledger(folder / "composed.journal", whole=False, caps=[Cap("the policy", 1e3, 1e-5)])
    charge()  # which imports the accountants
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        charge()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _summary(rates: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else [rates[0]] * 3
    return {"median": median, "low": low, "high": high}


def _peers(folder: Path) -> dict[str, Callable[[], None]]:
    return {
        "fedtune: RESERVE": _ledger(folder / "reserve.journal", whole=False),
        "SQLite: one insert": _sqlite(folder / "reserve.db", [SIZES["reserve"]]),
        "plain file: one write": _plain(folder / "reserve.bytes", [SIZES["reserve"]]),
        "fedtune: RESERVE, COMMIT, SENT": _ledger(folder / "round.journal", whole=True),
        "SQLite: three inserts": _sqlite(folder / "round.db", [670, 420, 350]),
        "plain file: three writes": _plain(folder / "round.bytes", [670, 420, 350]),
    }


def _ledger(path: Path, *, whole: bool, caps: list[Cap] = CAPS) -> Callable[[], None]:
    journal = Journal.create(path, "hospital", Ed25519PrivateKey.generate())
    journal.append(DATA, GRANT)
    ledger, numbers = Ledger(journal), count(1)

    def charge() -> None:
        number = next(numbers)
        reservation = ledger.reserve(Charge(PLAN, number, "training", input_of(number), 1, 2, EVENT), caps)
        if whole:
            ledger.sent(ledger.commit(reservation, PAYLOAD, 1_179_648))

    return charge


def _sqlite(path: Path, sizes: list[int]) -> Callable[[], None]:
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=full")
    database.execute("create table records (number integer primary key, line blob)")

    def insert() -> None:
        for size in sizes:
            database.execute("insert into records (line) values (?)", (os.urandom(size),))

    return insert


def _plain(path: Path, sizes: list[int]) -> Callable[[], None]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        for size in sizes:
            os.write(file, os.urandom(size))
            os.fsync(file)

    return write
