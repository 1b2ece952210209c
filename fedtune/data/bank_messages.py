"""SYNTHETIC bank customer messages, so that a first study needs no file: invented banks, invented customers.

Labels are as skewed between banks as real ones are, each bank has its own product names and its customers a manner of
writing, and a share of the messages does not say enough to tell the intent. Knows no task, partition or model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedtune.data import bank_phrases as phrases
from fedtune.data.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

LABEL_ALPHA = 1.0  # Dirichlet concentration of a bank's intents: some are several times as frequent as others
_VAGUE = 0.06
_TYPO = 0.2
_ASIDE = 0.3
_REDRAWS = 100


@dataclass(frozen=True, slots=True)
class _Bank:
    """One bank's product names and its customers' manner; rates are shares of messages in [0, 1]."""

    card: str
    account: str
    app: str
    polite: float
    lower_case: float


def generate(seed: int, banks: int = 6, per_bank: int = 200) -> Table:
    """Generate `banks · per_bank` messages with the columns `text`, `label` (18 intents) and `bank`.

    Intents of each bank are drawn from its own Dirichlet(`LABEL_ALPHA`) mix. Bank i is the same whatever `banks` is.
    Deterministic in `seed`: PCG64 streams only. A message repeats another only when 100 draws gave nothing new.
    """
    rows: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    for at in range(banks):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(at,))))
        rows += [(*message, f"synthetic-bank-{at + 1:02}") for message in _messages(rng, per_bank, seen)]
    texts, labels, names = zip(*rows, strict=True)
    columns = {"text": texts, "label": labels, "bank": names}
    return Table(columns, rows=len(rows), source=f"synthetic bank messages (seed {seed})", format="synthetic")


def _messages(rng: np.random.Generator, count: int, seen: set[str]) -> list[tuple[str, str]]:
    """Write one bank's messages, (text, intent) each, none of them already seen if that can be."""
    bank = _Bank(
        _pick(rng, phrases.CARDS),
        _pick(rng, phrases.ACCOUNTS),
        _pick(rng, phrases.APPS),
        rng.random(),
        rng.random() ** 2,
    )
    upto = np.cumsum(rng.dirichlet(np.full(len(phrases.INTENTS), LABEL_ALPHA)))
    written = []
    for _ in range(count):
        intent = tuple(phrases.INTENTS)[min(int(np.searchsorted(upto, rng.random())), len(upto) - 1)]
        text = _message(rng, bank, intent)
        for _ in range(_REDRAWS):
            if text not in seen:
                break
            text = _message(rng, bank, intent)
        seen.add(text)
        written.append((text, intent))
    return written


def _message(rng: np.random.Generator, bank: _Bank, intent: str) -> str:
    vague = [template for template, intents in phrases.VAGUE.items() if intent in intents]
    core = _pick(rng, vague) if vague and rng.random() < _VAGUE else _pick(rng, phrases.INTENTS[intent])
    parts = [
        _pick(rng, phrases.OPENERS) if rng.random() < bank.polite else "",
        core,
        _pick(rng, phrases.ASIDES) if rng.random() < _ASIDE else "",
        _pick(rng, phrases.CLOSERS) if rng.random() < bank.polite else "",
    ]
    text = " ".join(_filled(rng, bank, part) for part in parts if part)
    if rng.random() < _TYPO:
        text = _mistyped(rng, text)
    return text.lower().rstrip(".!") if rng.random() < bank.lower_case else text


def _filled(rng: np.random.Generator, bank: _Bank, template: str) -> str:
    """Fill a template's slots and begin it with a capital letter."""
    amount = _pick(rng, phrases.AMOUNTS).format(whole=int(rng.integers(3, 2500)), cents=f"{rng.integers(100):02}")
    text = template.format(
        card=bank.card,
        account=bank.account,
        app=bank.app,
        amount=amount,
        merchant=_pick(rng, phrases.MERCHANTS),
        city=_pick(rng, phrases.CITIES),
        when=_pick(rng, phrases.WHENS),
        years=int(rng.integers(2, 30)),
    )
    return text[:1].upper() + text[1:]


def _mistyped(rng: np.random.Generator, text: str) -> str:
    """Drop, double or swap one letter."""
    at = int(rng.integers(len(text) - 1))
    changed = (text[at + 1], text[at] + text[at] + text[at + 1], text[at + 1] + text[at])
    return text[:at] + _pick(rng, changed) + text[at + 2 :]


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
