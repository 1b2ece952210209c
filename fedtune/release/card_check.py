"""Whether a card says of ε what its release's manifest says: nobody reads a manifest, everybody reads a card."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from fedtune.config.plan import StudyPlan
from fedtune.release.card import cell, spent_text
from fedtune.release.manifest import Manifest, SiteFacts

_CLAIM = re.compile(r"ε\s*[=≤<]+\s*([0-9][0-9.,]*(?:[eE][-+]?[0-9]+)?)")
_LARGEST = re.compile(r"^\| largest ε spent by a site \| ([^|]*?) \|$", re.MULTILINE)
_PLANNED = re.compile(r"Planned was:.*")  # what a card says beside what was exceeded
_SHOWN = 1e-3  # of ε: cards round to four digits


def card_problems(card: str, manifest: Manifest, plan: StudyPlan) -> Iterator[str]:
    """Yield in words what a card says of ε that its manifest does not.

    Every site has its row with its ε and δ, no ε anywhere is below the largest that a site spent, and a study without
    privacy says so.
    """
    if plan.promise.mode == "off":
        if "NOT PRIVATE" not in card:
            yield "the card does not say that the study was NOT PRIVATE"
        return
    rows = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in card.splitlines() if "|" in line]
    for site in manifest.sites:
        yield from _site(site, plan, [row for row in rows if row[:1] == [cell(site.name)]])
    most = max((site.spent or 0.0 for site in manifest.sites), default=0.0)
    claims = [*_CLAIM.findall(_PLANNED.sub("", card)), *(text.split(" ")[0] for text in _LARGEST.findall(card))]
    for claim in claims:
        if _number(claim) * (1 + _SHOWN) < most:
            yield f"the card speaks of ε = {claim}, and a site has spent {most:.4g}"


def _site(site: SiteFacts, plan: StudyPlan, rows: list[list[str]]) -> Iterator[str]:
    expected = [spent_text(plan, site.epsilon), f"{plan.promise.delta:.3g}"]
    if not rows:
        yield f"the card has no row for {site.name}"
    for row in rows:
        if row[2:4] != expected:
            said = " at δ = ".join(row[2:4]) or "nothing"
            yield f"the card says ε = {said} of {site.name}, the manifest {' at δ = '.join(expected)}"


def _number(text: str) -> float:
    try:
        return float(text.rstrip(".,").replace(",", ""))
    except ValueError:
        return -math.inf  # no number where one should stand
