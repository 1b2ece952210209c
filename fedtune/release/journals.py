"""What a site's journal says about a release: whether the head is its own, and what was charged for the study.

The journal is checked as `fedtune audit verify` does; nothing of the site's secrets is needed.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import PrivacyError
from fedtune.journal.spending import Spending
from fedtune.journal.verify import Verdict, verify
from fedtune.journal.witness import Receipt
from fedtune.release.manifest import SiteFacts

TOLERANCE = 1e-6  # of ε: two machines round a composition apart by less


@dataclass(frozen=True, slots=True)
class Opened:
    """A journal and what it is worth as such; `keys` are all keys that the site has had."""

    path: Path
    verdict: Verdict

    @property
    def keys(self) -> frozenset[str]:
        """Every key that the site has put in force."""
        return frozenset(key.public_key for key in self.verdict.keys)


def open_journal(path: Path) -> Opened:
    """Read a journal whole. Errors: those of `fedtune.journal.verify`."""
    return Opened(path, verify(path))


def lacks_head(journal: Opened, receipt: Receipt) -> str:
    """Return why a head is not one of this journal's, in words; an empty string where it is."""
    with tempfile.TemporaryDirectory() as folder:
        heads = Path(folder) / "heads.jsonl"
        heads.write_text(json.dumps(receipt.to_dict()) + "\n", encoding="utf-8")
        verdict = verify(journal.path, receipts=heads)
    return verdict.reason if verdict.outcome == "rolled-back" else ""


def charged(spending: Spending, plan: str, delta: float) -> float:
    """Return the largest ε at δ that a plan has charged to one account; ∞ after a round without privacy.

    Data sets that may hold the same people are one account, as for the site's own caps.
    """
    accounts = [account for account in spending.accounts() if plan in spending.plans(account)]
    try:
        return max((spending.spent(account, plan=plan).epsilon(delta) for account in accounts), default=0.0)
    except PrivacyError:
        return math.inf  # rounds that protect different units bound nothing together


def unsupported(spending: Spending, plan: str, site: SiteFacts) -> str:
    """Return why a journal does not bear out what a release says a site has spent; an empty string where it does.

    A release may say more than was charged, never less, and ε only where no round of the study went without privacy.
    """
    if site.delta is None:
        return ""
    found = charged(spending, plan, site.delta)
    said = site.spent
    if said is None:
        return f"no ε is said of {site.name}, and its journal was charged ε = {found:.4g} at δ = {site.delta:g}"
    if found > said * (1 + TOLERANCE):
        return f"ε = {said:.4g} is said of {site.name}; its journal was charged {found:.4g} at δ = {site.delta:g}"
    return ""
