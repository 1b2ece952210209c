"""The robust rules as data: how many sites each needs for f attackers, what it costs, where it may act, whose it is.

n sites, f of them attackers, P numbers a site. *Product* says whether the rule needs inner products of updates alone,
so that it can act on B·A in product space; a rule that needs coordinates cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from fedtune.errors import AggregationError

HALF: Final = 0.5


@dataclass(frozen=True, slots=True)
class RuleTraits:
    """One rule. `least_sites(f)` is the smallest n that it works for, and `needs` says it in words.

    `shares` says whether sites may count unequally: the others look at each site once.
    """

    name: str
    needs: str
    least_sites: Callable[[int], int]
    breakdown: str
    cost: str
    source: str
    product: bool
    shares: bool = False


RULES: Final = {
    rule.name: rule
    for rule in (
        RuleTraits(
            "median",
            "n ≥ 2f + 1",
            lambda f: 2 * f + 1,
            "f < n/2: each entry stays within the honest sites' values",
            "O(P·n·log n)",
            "Yin et al., arXiv 1803.01498",
            product=False,
        ),
        RuleTraits(
            "trimmed_mean",
            "n ≥ 2f + 1",
            lambda f: 2 * f + 1,
            "f < n/2: each entry stays within the honest sites' values",
            "O(P·n·log n)",
            "Yin et al., arXiv 1803.01498",
            product=False,
        ),
        RuleTraits(
            "geometric_median",
            "n ≥ 2f + 1",
            lambda f: 2 * f + 1,
            "attackers' shares below 1/2: within 2(1 − α)/(1 − 2α) honest radii of any point, α the attackers' share",
            "O(P·n²) and O(n²) an iteration",
            "RFA, Pillutla et al., arXiv 1912.13445",
            product=True,
            shares=True,
        ),
        RuleTraits(
            "krum",
            "n ≥ 2f + 3",
            lambda f: 2 * f + 3,
            "2f + 2 < n: one update, with no larger score than the best honest one",
            "O(P·n²)",
            "Blanchard et al., arXiv 1703.02757",
            product=True,
        ),
        RuleTraits(
            "multi_krum",
            "n ≥ 2f + 3",
            lambda f: 2 * f + 3,
            "2f + 2 < n: a mean of updates, none with a larger score than the worst honest one",
            "O(P·n²)",
            "Blanchard et al., arXiv 1703.02757",
            product=True,
        ),
        RuleTraits(
            "bulyan",
            "n ≥ 4f + 3",
            lambda f: 4 * f + 3,
            "4f + 2 < n: no entry is farther from the selected sites' median than an honest value is",
            "O(P·n²)",
            "El Mhamdi et al., arXiv 1802.07927",
            product=False,
        ),
        RuleTraits(
            "norm_clip",
            "n ≥ 2f + 1",
            lambda f: 2 * f + 1,
            "attackers move the result by at most their share times the threshold",
            "O(P·n)",
            "Sun et al., arXiv 1911.07963",
            product=True,
            shares=True,
        ),
    )
}


def traits_of(name: str) -> RuleTraits:
    """Return the rule of that name; `unknown-rule` names those there are."""
    if name not in RULES:
        raise AggregationError(
            "unknown-rule", f"there is no robust rule {name!r}", hint=f"use one of {', '.join(RULES)}"
        )
    return RULES[name]


def check_sites(name: str, sites: int, attackers: int) -> None:
    """Raise unless the rule works for n = `sites` of which f = `attackers` may be anything.

    Errors: `unknown-rule`; `bad-attackers` for a negative f; `too-few-sites`, which names what the rule needs, the
    paper that says so, the largest f that would do, and the sites that would.
    """
    rule = traits_of(name)
    if attackers < 0:
        raise AggregationError("bad-attackers", f"{attackers} attackers", hint="give 0 or more attackers")
    least = rule.least_sites(attackers)
    if sites >= least:
        return
    most = max((f for f in range(attackers) if rule.least_sites(f) <= sites), default=None)
    smaller = f", or at most {most} attackers" if most is not None else ""
    raise AggregationError(
        "too-few-sites",
        f"{name} needs {rule.needs} ({rule.source}): with f = {attackers} attackers {least} sites, there are {sites}",
        hint=f"use {least} or more sites{smaller}, or another rule",
    )


def check_shares(name: str, shares: Sequence[float], attackers: int) -> None:
    """Raise unless the rule can honour the sites' shares and f attackers hold less than half of them.

    Errors: those of `check_sites`; `unequal-weights`; `heavy-sites` where the f heaviest sites hold half or more.
    """
    check_sites(name, len(shares), attackers)
    if not traits_of(name).shares and max(shares) > min(shares) * (1 + 1e-9):
        able = [rule.name for rule in RULES.values() if rule.shares]
        raise AggregationError(
            "unequal-weights",
            f"{name} counts every site once, and the plan gives sites unequal weights",
            hint=f"use aggregation.weights=equal, or one of {', '.join(able)}",
        )
    heaviest = sum(sorted(shares, reverse=True)[:attackers])
    if heaviest >= HALF * sum(shares):
        raise AggregationError(
            "heavy-sites",
            f"the {attackers} heaviest sites hold {heaviest:.2f} of all weight; no rule survives half of it",
            hint="use aggregation.weights=equal or assume fewer attackers",
        )
