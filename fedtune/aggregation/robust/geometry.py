"""Inner products and distances of updates: of flat updates, and of products B·A that are never formed.

Everything is measured from the last global adapter. That keeps float64 exact enough, because an update is short beside
the adapter, and it keeps the geometry of two honest sites out of an attacker's reach: no entry of it uses a third.

Knows no rule. Distances come from inner products, so two updates closer than about 10⁻⁸ of their length count as equal.
"""

# ruff: noqa: N803, N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedtune.aggregation.robust.updates import Factor, Matrix, Updates, blocks, finite, heads_of

if TYPE_CHECKING:
    from fedtune.model.layout import AdapterLayout, AdapterState


def flat_gram(layout: AdapterLayout, updates: Updates, centre: AdapterState) -> Matrix:
    """Return G (n, n), Gᵢⱼ = ⟨uᵢ − g, uⱼ − g⟩ over all tensors of the layout, g the last global. O(P·n²)."""
    n = len(updates.shares)
    gram = np.zeros((n, n))
    for name in layout.names:
        reference = centre[name].reshape(-1).astype(np.float64)
        for columns, rows in blocks(layout, updates, name):
            differences = rows - reference[columns]
            gram += differences @ differences.T
    return gram


def product_gram(layout: AdapterLayout, updates: Updates, centre: AdapterState, scale: float) -> Matrix:
    """Return G (n, n), Gᵢⱼ = s²·Σ_layers ⟨Bᵢ·Aᵢ − B·A, Bⱼ·Aⱼ − B·A⟩ + Σ_heads ⟨hᵢ − h, hⱼ − h⟩.

    (A, B, h) is the last global. s = alpha / r makes a layer's numbers weights of the model, as a head's are. Ranks may
    differ from site to site.
    Cost O(n²·r²·(d_out + d_in)) a layer, memory O(n·r·(d_out + d_in)); no (d_out, d_in) matrix is formed.
    """
    gram = flat_gram(heads_of(layout), updates, centre)
    for spec_A, spec_B in layout.pairs:
        As, Bs = ([finite(own, s.name) for own in updates.tensors(s.name)] for s in (spec_A, spec_B))
        gram += scale**2 * layer_gram(As, Bs, centre[spec_A.name], centre[spec_B.name])
    return gram


def layer_gram(As: Sequence[Factor], Bs: Sequence[Factor], A: Factor, B: Factor) -> Matrix:
    """Return G (n, n) of Dᵢ = Bᵢ·Aᵢ − B·A for one layer, from the small Gram matrices of the factors.

    Dᵢ = (Bᵢ − B)·Aᵢ + B·(Aᵢ − A) = Lᵢ·Rᵢ with Lᵢ = [Bᵢ − B, B] and Rᵢ = [Aᵢ; Aᵢ − A] of rank 2r, so nothing of the
    length of B·A has to cancel, and tr(Dᵢᵀ·Dⱼ) = tr(LᵢᵀLⱼ·RⱼRᵢᵀ) = Σ (LᵢᵀLⱼ)∘(RᵢRⱼᵀ), entry by entry.
    """
    rank = max(A.shape[0], *(own.shape[0] for own in As))
    A, B = _padded(A, rank, 0), _padded(B, rank, 1)
    right = np.stack([np.concatenate([own, own - A]) for own in (_padded(own, rank, 0) for own in As)])
    left = np.stack([np.concatenate([own - B, B], axis=1).T for own in (_padded(own, rank, 1) for own in Bs)])
    joined_right, joined_left = right.reshape(-1, A.shape[1]), left.reshape(-1, B.shape[0])
    rows = [
        ((one_left @ joined_left.T) * (one_right @ joined_right.T)).reshape(2 * rank, len(As), 2 * rank).sum((0, 2))
        for one_left, one_right in zip(left, right, strict=True)
    ]
    gram = np.array(rows, np.float64)
    symmetric: Matrix = 0.5 * (gram + gram.T)
    return symmetric


def squared_distances(gram: Matrix) -> Matrix:
    """Return D (n, n), Dᵢⱼ = Gᵢᵢ + Gⱼⱼ − 2·Gᵢⱼ, never below zero and zero on the diagonal."""
    lengths = np.diag(gram)
    distances = np.maximum(lengths[:, None] + lengths[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def _padded(factor: Factor, rank: int, axis: int) -> Matrix:
    """Return the factor in float64 with zero rows (axis 0) or columns (axis 1) up to `rank`; B·A is unchanged."""
    missing = rank - factor.shape[axis]
    widths = ((0, missing), (0, 0)) if axis == 0 else ((0, 0), (0, missing))
    return np.pad(np.asarray(factor, np.float64), widths)
