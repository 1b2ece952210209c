"""`fedsvd`: train B beside a frozen A, then rewrite the pair so that A has orthonormal rows again.

    site    trains and sends B (d_out, r), head; A (r, d_in) is the one that came down
    server  B̄ = Σ pᵢ·Bᵢ, then B̄·A = U·Σ·Vᵀ at rank r:  A ← Vᵀ,  B ← U·Σ
    exact   Σ pᵢ·Bᵢ·A = B̄·A, and the rewriting keeps the product

The SVD is of small matrices (thin QR of both factors, then r×r): B̄·A is never formed. It is post-processing of what
was released, so it is free under DP; with orthonormal rows a noise ξ_B costs ‖ξ_B·A‖ = ‖ξ_B‖ in W, no more in one
direction than in another. The rows of the new A span those of the old: from a random start, A turns inside its first
row space and never leaves it. Momentum on B is a direction of W, so it turns along; second moments belong to single
entries and cannot. Traffic: r·d_out up, P down. Source: FedSVD (arXiv 2505.12805), there by a dense SVD.
"""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from fedtune.aggregation.algebra import basis_change, thin_refactor
from fedtune.aggregation.lora.factors import rounded_pair
from fedtune.aggregation.lora.ffa import without_A
from fedtune.aggregation.lora.linear import linear
from fedtune.aggregation.lora.protocol import (
    LINEAR_OPTIMIZER,
    Algorithm,
    Exactness,
    Options,
    ServerState,
    Traits,
)
from fedtune.aggregation.server_optimizers import MOMENTUM, OptimizerState
from fedtune.model.layout import AdapterLayout

TRAITS = Traits(
    source="arXiv 2505.12805",
    exactness=Exactness("exact", "Σ pᵢ·Bᵢ·A = B̄·A = U·Σ·Vᵀ at rank r"),
    linear=True,
    noisy=frozenset({"B"}),
    trained_as="turned",
    optimizers=LINEAR_OPTIMIZER,
)


def fedsvd(_options: Options) -> Algorithm:
    """Return the algorithm: B and the head go up, the re-factored pair and the head come down."""
    return linear(
        "fedsvd",
        TRAITS,
        lambda layout, _turn: without_A(layout),
        lambda layout, _turn, _since: layout,
        finish=refactored,
    )


def refactored(layout: AdapterLayout, state: ServerState) -> ServerState:
    """Give every A orthonormal rows and turn the momentum of B with them; no product B·A changes."""
    adapter, moments = dict(state.adapter), dict(state.optimizer.moments)
    for spec_A, spec_B in layout.pairs:
        A, B = adapter[spec_A.name], adapter[spec_B.name]
        new_A, new_B = thin_refactor(A, B)
        adapter[spec_A.name], adapter[spec_B.name] = rounded_pair((new_A, new_B), like=B)
        momentum = MOMENTUM + spec_B.name
        if momentum in moments:
            moments[momentum] = moments[momentum] @ basis_change(A, new_A)
    return ServerState(adapter, OptimizerState(state.optimizer.step, moments), state.memory)
