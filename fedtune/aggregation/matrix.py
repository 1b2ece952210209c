"""What each algorithm can be combined with, as data: made of its traits, read by checks and by the documentation.

Every cell is a choice from a short list, and each "no" has its reason and the nearest choice that works. The plan is
refused by the same rows that the documentation shows (`fedtune.aggregation.compatibility`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedtune.aggregation.lora.protocol import Traits
from fedtune.aggregation.lora.registry import ALGORITHMS, get_algorithm
from fedtune.aggregation.robust.traits import RULES

ALL_RULES: Final = tuple(RULES)
PRODUCT_RULES: Final = tuple(name for name, rule in RULES.items() if rule.product)
_ONE_FACTOR: Final = frozenset({"ffa", "rolora", "fedsvd", "fedsb"})  # ΔW is linear in what a round sends


@dataclass(frozen=True, slots=True)
class Row:
    """One algorithm. `noise` is how the error in W grows with the noise under DP, `robust` the rules that it can use.

    `secure` is whether sums under masks are enough; `ranks` whether sites may differ; `rounded_base` whether the base
    may be quantised or bfloat16; `keeps` whether a site may keep moments, residuals and variates between rounds, which
    are vectors in the coordinates of what it trains.
    """

    name: str
    traits: Traits
    noise: str
    robust: tuple[str, ...]
    keeps_moments: bool
    keeps_residuals: bool
    keeps_variates: bool

    @property
    def secure(self) -> bool:
        """Whether the coordinator needs nothing but sums."""
        return self.traits.linear

    @property
    def ranks(self) -> bool:
        """Whether sites may have ranks of their own."""
        return self.traits.ranks == "any"

    @property
    def rounded_base(self) -> bool:
        """Whether a base below float32 is as good as any."""
        return not self.traits.changes_base


def row_of(name: str) -> Row:
    """Return an algorithm's row."""
    traits = get_algorithm(name).traits
    turned, alternating = traits.trained_as == "turned", traits.trained_as == "alternating"
    one_exchange = traits.exchanges == 1
    return Row(
        name,
        traits,
        "quadratic" if traits.noise_multiplies else "linear",
        ALL_RULES if name in _ONE_FACTOR else PRODUCT_RULES if name == "flexlora" else (),
        keeps_moments=not turned and not alternating,
        keeps_residuals=not turned and one_exchange,
        keeps_variates=not turned and not alternating and one_exchange,
    )


def matrix() -> tuple[Row, ...]:
    """Return every algorithm's row."""
    return tuple(row_of(name) for name in ALGORITHMS)


def as_markdown() -> str:
    """Return the matrix as the table of the documentation."""
    head = (
        "algorithm",
        "equals M",
        "noise in W",
        "server optimisers",
        "secure aggregation",
        "robust rules",
        "ranks",
        "base below float32",
        "kept moments",
        "error feedback",
        "SCAFFOLD",
        "release",
    )
    lines = [head, ("---",) * len(head), *(_cells(row) for row in matrix())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    optimizers = {1: "fedavg", 2: "fedavg, fedavgm"}.get(len(row.traits.optimizers), "all")
    robust = {0: "none", len(ALL_RULES): "all"}.get(len(row.robust), "of products")
    return (
        f"`{row.name}`",
        row.traits.exactness.kind,
        row.noise,
        optimizers,
        _yes(row.secure),
        robust,
        row.traits.ranks,
        *(_yes(cell) for cell in (row.rounded_base, row.keeps_moments, row.keeps_residuals, row.keeps_variates)),
        _yes(row.traits.releases),
    )


def _yes(cell: bool) -> str:
    return "yes" if cell else "no"
