"""The robust rules on adapters: from what n sites sent to the next mean, or to the weights of one.

`robust_state` acts on the entries of what is sent, for algorithms whose ΔW is linear in it (`ffa`, `fedsvd`, one factor
of `rolora`, `fedsb`); its result takes the place of the sites' mean. `product_blend` acts on the products B·A and
returns weights: Σ wᵢ·Bᵢ·Aᵢ + rest·B·A is then what an exact algorithm (`flora`, `fedex`, `flexlora`) would make of
sites with these weights and of the last global as one more site; `blended` does it by the best approximation of rank r.

Sites come in the order of their names, so that ties do not depend on who was quick. Memory: the updates of all sites,
which `SpillingStack` keeps on disk over a bound, and 32 MiB.
"""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregation.algebra import best_rank
from fedtune.aggregation.robust.clipping import clip_factors
from fedtune.aggregation.robust.coordinates import mean_around_median, median, trimmed_mean
from fedtune.aggregation.robust.geometric_median import geometric_median
from fedtune.aggregation.robust.geometry import flat_gram, product_gram, squared_distances
from fedtune.aggregation.robust.krum import bulyan_selection, equal_weights, krum, multi_krum
from fedtune.aggregation.robust.traits import RULES, check_shares, traits_of
from fedtune.aggregation.robust.updates import Matrix, Updates, blocks, finite, heads_of
from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedtune.aggregation.robust.updates import Factor
    from fedtune.model.layout import AdapterLayout, AdapterState, Array, TensorSpec

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RobustRule:
    """A rule and its numbers: `attackers` is f, what the plan assumes at most, not what anyone has counted.

    `chosen` is Multi-Krum's m, n − f when None. `threshold` is norm clipping's τ, the median of the norms when None.
    Errors: `unknown-rule`, `bad-threshold`.
    """

    name: str
    attackers: int
    chosen: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        traits_of(self.name)
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold > 0):
            raise AggregationError("bad-threshold", f"a threshold of {self.threshold}", hint="give a length above 0")


@dataclass(frozen=True, slots=True)
class Blend:
    """What a rule of distances decides: Σ wᵢ·uᵢ + rest·g, with g the last global; the weights and the rest sum to 1."""

    weights: tuple[float, ...]
    rest: float


def robust_state(rule: RobustRule, layout: AdapterLayout, updates: Updates, centre: AdapterState) -> dict[str, Array]:
    """Return the rule's answer to flat updates as float32 tensors of `layout`, which is what was sent.

    `centre` is the last global adapter. Permutations of the sites and a translation of everything permute and translate
    the result, up to rounding and ties. Errors: those of `check_shares`, `both-factors` where A and B of a layer are
    sent, `wrong-state`, `not-finite`, `bad-selection`.
    """
    check_shares(rule.name, updates.shares, rule.attackers)
    _check_one_factor(layout)
    if not RULES[rule.name].product:
        by_columns = _by_columns(rule, layout, updates, centre)
        return {spec.name: _columnwise(by_columns, layout, updates, spec) for spec in layout.tensors}
    blend = _blend(rule, flat_gram(layout, updates, centre), updates)
    return {spec.name: _blended_tensor(blend, updates, centre, spec) for spec in layout.tensors}


def product_blend(
    rule: RobustRule, layout: AdapterLayout, updates: Updates, centre: AdapterState, *, scale: float
) -> Blend:
    """Return the weights of the sites' products B·A, of any rank, and of the last global.

    `scale` is s = alpha / r; heads count as they are. Errors: as `robust_state`, and `needs-coordinates` for a rule
    that looks at single entries of ΔW, which nobody forms.
    """
    check_shares(rule.name, updates.shares, rule.attackers)
    if not RULES[rule.name].product:
        able = [name for name, traits in RULES.items() if traits.product]
        raise AggregationError(
            "needs-coordinates",
            f"{rule.name} looks at single entries of the update, and with both factors sent nobody forms them",
            hint=f"use one of {', '.join(able)}, or an algorithm that freezes a factor (ffa, fedsvd, fedsb)",
        )
    return _blend(rule, product_gram(layout, updates, centre, scale), updates)


def blended(blend: Blend, layout: AdapterLayout, updates: Updates, centre: AdapterState) -> dict[str, Array]:
    """Return float32 factors nearest to Σ wᵢ·Bᵢ·Aᵢ + rest·B·A, layer by layer at the layout's rank, and the heads."""
    state = {spec.name: _blended_tensor(blend, updates, centre, spec) for spec in heads_of(layout).tensors}
    for spec_A, spec_B in layout.pairs:
        weights, As = _members(blend, updates, centre, spec_A.name)
        _, Bs = _members(blend, updates, centre, spec_B.name)
        A, B = best_rank(As, Bs, weights, spec_A.shape[0])
        state[spec_A.name], state[spec_B.name] = A.astype(np.float32), B.astype(np.float32)
    return {name: state[name] for name in layout.names}


def _check_one_factor(layout: AdapterLayout) -> None:
    """Refuse entries that mean nothing: (B·M⁻¹)·(M·A) is one update for every invertible M."""
    factors = {"lora_A", "lora_B"}
    if factors <= {spec.role for spec in layout.tensors}:
        raise AggregationError(
            "both-factors",
            "the sites send A and B, and equal updates B·A can have any entries in A and B",
            hint="use an algorithm that freezes a factor (ffa, fedsvd, fedsb), or a rule in product space",
        )


def _blend(rule: RobustRule, gram: Matrix, updates: Updates) -> Blend:
    """Return the weights of a rule that needs inner products alone."""
    shares, n = np.array(updates.shares), len(gram)
    if rule.name == "norm_clip":
        factors = clip_factors(np.sqrt(np.diag(gram)), rule.threshold)
        return Blend(tuple((shares * factors).tolist()), float((shares * (1 - factors)).sum()))
    if rule.name == "geometric_median":
        return Blend(tuple(geometric_median(gram, shares).tolist()), 0.0)
    distances = squared_distances(gram)
    if rule.name == "krum":
        return Blend(tuple(equal_weights([krum(distances, rule.attackers)], n).tolist()), 0.0)
    selected = multi_krum(distances, rule.attackers, rule.chosen)
    return Blend(tuple(equal_weights(selected, n).tolist()), 0.0)


def _by_columns(
    rule: RobustRule, layout: AdapterLayout, updates: Updates, centre: AdapterState
) -> Callable[[Matrix], Vector]:
    """Return what a rule of coordinates does with rows (n, columns)."""
    if rule.name == "median":
        return median
    if rule.name == "trimmed_mean":
        return lambda rows: trimmed_mean(rows, rule.attackers)
    selected = bulyan_selection(squared_distances(flat_gram(layout, updates, centre)), rule.attackers)
    keep = len(selected) - 2 * rule.attackers
    return lambda rows: mean_around_median(rows[selected], keep)


def _columnwise(
    by_columns: Callable[[Matrix], Vector], layout: AdapterLayout, updates: Updates, spec: TensorSpec
) -> Array:
    result = np.empty(spec.size, np.float32)
    for columns, rows in blocks(layout, updates, spec.name):
        result[columns] = by_columns(rows)
    return result.reshape(spec.shape)


def _blended_tensor(blend: Blend, updates: Updates, centre: AdapterState, spec: TensorSpec) -> Array:
    total = np.zeros(spec.shape)
    for weight, tensor in zip(*_members(blend, updates, centre, spec.name), strict=True):
        total += weight * np.asarray(tensor, np.float64)
    return finite(total, spec.name).astype(np.float32)


def _members(blend: Blend, updates: Updates, centre: AdapterState, name: str) -> tuple[list[float], list[Factor]]:
    """Return the weights above zero and their tensors; the last global stands at the end."""
    weights, tensors = [*blend.weights, blend.rest], [*updates.tensors(name), centre[name]]
    members = [(weight, tensor) for weight, tensor in zip(weights, tensors, strict=True) if weight > 0]
    return [weight for weight, _ in members], [tensor for _, tensor in members]
