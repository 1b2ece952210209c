"""Which studies make the table: every rule against every attack and every share of attackers, in the order of need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Final

from fedtune.aggregation.robust.traits import RULES, check_sites
from fedtune.errors import AggregationError

SITES: Final = 10
NONE: Final = "no attack"
BACKDOOR: Final = "backdoor"
ATTACKS: Final = ("sign_flip", "scaled", "gaussian", BACKDOOR, "little_is_enough")
UNDEFENDED: Final = "none"
ALL_RULES: Final = (UNDEFENDED, *RULES)
PRODUCT_RULES: Final = (UNDEFENDED, *(name for name, rule in RULES.items() if rule.product))
_READS_F: Final = ("trimmed_mean", "krum", "multi_krum", "bulyan")  # the others do not look at how many are assumed


@dataclass(frozen=True, slots=True)
class Cell:
    """One study: `attackers` of ten sites attack, and the rule assumes `assumed` of them."""

    algorithm: str
    rule: str
    attack: str
    attackers: int
    assumed: int
    seed: int = 0

    @property
    def key(self) -> str:
        """What tells this study from every other one of the table."""
        return " ".join(map(str, (self.algorithm, self.rule, self.attack, self.attackers, self.assumed, self.seed)))

    @property
    def words(self) -> list[str]:
        """The settings in which it differs from the others."""
        assumed = 0 if self.rule == UNDEFENDED else self.assumed
        return [
            f"seed={self.seed}",
            f"aggregation.algorithm={self.algorithm}",
            f"aggregation.robust={self.rule}",
            f"aggregation.attackers={assumed}",
            f"federation.sites={SITES}",
        ]

    @property
    def refusal(self) -> str:
        """Why the plan is refused, or an empty string."""
        if self.rule == UNDEFENDED:
            return ""
        try:
            check_sites(self.rule, SITES, self.assumed)
        except AggregationError:
            return RULES[self.rule].needs
        return ""


def table(seed: int = 0) -> list[Cell]:
    """Return all studies of a seed: first those without which no table can be read."""
    return [
        *without_attack("ffa", ALL_RULES, seed),
        *_most_assumed(seed),
        *against("ffa", ALL_RULES, [2, 3], seed),
        *without_attack("flexlora", PRODUCT_RULES, seed),
        *against("flexlora", PRODUCT_RULES, [2], seed),
        *against("ffa", ALL_RULES, [4, 1], seed),
    ]


def without_attack(algorithm: str, rules: Iterable[str], seed: int = 0) -> list[Cell]:
    """Return the studies in which nobody attacks and none are assumed to."""
    return [Cell(algorithm, rule, NONE, 0, 0, seed) for rule in rules]


def against(algorithm: str, rules: Iterable[str], counts: Iterable[int], seed: int = 0) -> list[Cell]:
    """Return the studies in which as many attack as the rule assumes; those that are refused are among them."""
    return [Cell(algorithm, rule, attack, n, n, seed) for n, attack, rule in product(counts, ATTACKS, rules)]


def most_attackers(rule: str) -> int:
    """Return how many attackers among the ten sites a rule can be told of."""
    return max(f for f in range(SITES) if not Cell("ffa", rule, NONE, 0, f).refusal)


def _most_assumed(seed: int) -> list[Cell]:
    """Return what the defence costs where nobody attacks: each rule told of as many attackers as it allows."""
    return [Cell("ffa", rule, NONE, 0, most_attackers(rule), seed) for rule in _READS_F]
