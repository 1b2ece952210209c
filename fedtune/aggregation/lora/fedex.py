"""`fedex`: average the factors, and add to the base what the average misses. The mean update exactly.

    site    trains and sends Aᵢ (r, d_in), Bᵢ (d_out, r), head
    server  Ā = Σ pᵢ·Aᵢ,  B̄ = Σ pᵢ·Bᵢ, and the residual M − B̄·Ā as factors
    site    W0 ← W0 + s·residual, adapter (Ā, B̄)
    exact   B̄·Ā + residual = Σ pᵢ·Bᵢ·Aᵢ

The residual is Σ pᵢ·(Bᵢ − B̄)·(Aᵢ − Ā). Because Σ pᵢ·(Bᵢ − B̄) = 0, any one matrix may be subtracted from all Aᵢ, and
with one site's, A_j, that site's term vanishes:

    M − B̄·Ā = Σ_{i≠j} pᵢ·(Bᵢ − B̄)·(Aᵢ − A_j)

These are factors of rank (K − 1)·r in closed form: no SVD, and the dense residual is never formed, let alone
transposed. One site has no residual. Of a rank above min(d_out, d_in) they are re-factored to it, exact up to rounding.
The coordinator holds the K replies of a round and one increment for each round (`drift`). Under DP both factors are
noisy: ξ_B·ξ_A. Traffic: P up, P + (K − 1)·P down. Source: FedEx-LoRA (arXiv 2410.09432).
"""

# ruff: noqa: N803, N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import numpy as np

from fedtune.aggregation.lora import drift
from fedtune.aggregation.lora.factors import Factors, State, rounded_pair, select
from fedtune.aggregation.lora.gather import Gathered, Stack
from fedtune.aggregation.lora.linear import adapter_update
from fedtune.aggregation.lora.protocol import (
    NO_OPTIMIZER,
    Algorithm,
    Exactness,
    Options,
    ServerState,
    SiteHalf,
    SiteState,
    Traits,
    Turn,
)
from fedtune.aggregation.lora.stacked import everything, factors, server_half, site_half
from fedtune.model.layout import AdapterLayout, TensorSpec

TRAITS = Traits(
    source="arXiv 2410.09432",
    exactness=Exactness("exact", "B̄·Ā + Σ_{i≠j} pᵢ·(Bᵢ − B̄)·(Aᵢ − A_j) = Σ pᵢ·Bᵢ·Aᵢ"),
    linear=False,
    noisy=frozenset({"A", "B"}),
    changes_base=True,
    incremental=True,
    optimizers=NO_OPTIMIZER,
)


def fedex(_options: Options) -> Algorithm:
    """Return the algorithm: the factors are averaged and stacked, the mean and the residual come down."""
    site = site_half()
    return Algorithm(
        "fedex",
        TRAITS,
        SiteHalf(site.start, site.trained, receive, site.send, site.kept),
        server_half(send, aggregate, update),
        everything,
        factors,
        lambda layout, _turn, _since: layout,
    )


def receive(layout: AdapterLayout, _turn: Turn, state: SiteState, message: State) -> SiteState:
    """Take the mean factors as the adapter, and the residuals the site lacks as increments of the base."""
    return SiteState({**state.adapter, **drift.without(message)}, drift.from_message(layout, message))


def send(layout: AdapterLayout, _turn: Turn, state: ServerState, since: int) -> State:
    """Return the mean factors, the head and the residuals that the site lacks."""
    return {**select(state.adapter, layout), **drift.to_message(layout, state.memory, since)}


def aggregate(layout: AdapterLayout, turn: Turn, state: ServerState, gathered: Gathered) -> ServerState:
    """Remember the residual of the means, which the adapter holds by now."""
    increments = {A.layer: residual(gathered.stack, A, B) for A, B in layout.pairs}
    memory = drift.remember(state.memory, turn.number, increments, layout)
    return ServerState(state.adapter, state.optimizer, memory)


def residual(stack: Stack, spec_A: TensorSpec, spec_B: TensorSpec) -> Factors:
    """Return one layer's residual (A ((K − 1)·r, d_in), B (d_out, (K − 1)·r)), rank at most min(d_out, d_in)."""
    As = [np.asarray(A, np.float64) for A in stack.tensors(spec_A.name)]
    Bs = [np.asarray(B, np.float64) for B in stack.tensors(spec_B.name)]
    mean_B = sum(share * B for share, B in zip(stack.shares, Bs, strict=True))
    *others, last = As
    A = np.concatenate([np.zeros((0, spec_A.shape[1])), *(other - last for other in others)])
    moved = [share * (B - mean_B) for share, B in zip(stack.shares, Bs, strict=True)][:-1]
    B = np.concatenate([np.zeros((spec_B.shape[0], 0)), *moved], axis=1)
    return rounded_pair(drift.trimmed(A, B), like=stack.tensors(spec_B.name)[0])


def update(layout: AdapterLayout, state: ServerState) -> dict[str, Factors]:
    """Return the factors of drift and adapter together."""
    return drift.total(layout, state.memory, adapter_update(layout, state))
