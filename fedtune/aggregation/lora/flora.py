"""`flora`: stack the factors. The mean update exactly, at any ranks, added to the base.

    site    trains and sends Aᵢ (rᵢ, d_in), Bᵢ (d_out, rᵢ), head
    server  B = [B₁ … B_K] (d_out, Σrᵢ),  A = [p₁·A₁; …; p_K·A_K] (Σrᵢ, d_in)
    exact   B·A = Σ pᵢ·Bᵢ·Aᵢ
    site    W0 ← W0 + s·B·A, then a fresh pair: A drawn from the seed, the round and the layer, B zero

The weight pᵢ stands on one factor: on both, the sum would be Σ pᵢ²·Bᵢ·Aᵢ. A stack of rank above min(d_out, d_in) is
re-factored to that rank, exact up to rounding. The coordinator holds the K replies of a round and one increment for
each round (`drift`). Under DP both factors are noisy: ξ_B·ξ_A. Traffic: Pᵢ up, ΣPᵢ down.
Source: FLoRA (arXiv 2409.05976).
"""

# ruff: noqa: N803, N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import numpy as np

from fedtune.aggregation.lora import drift
from fedtune.aggregation.lora.draws import uniform_A
from fedtune.aggregation.lora.factors import Factors, State, rounded_pair, select
from fedtune.aggregation.lora.gather import Gathered, Stack
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
from fedtune.aggregation.lora.stacked import factors, head, server_half, site_half
from fedtune.model.layout import AdapterLayout, TensorSpec

TRAITS = Traits(
    source="arXiv 2409.05976",
    exactness=Exactness("exact", "[B₁ … B_K]·[p₁·A₁; …; p_K·A_K] = Σ pᵢ·Bᵢ·Aᵢ"),
    linear=False,
    noisy=frozenset({"A", "B"}),
    ranks="any",
    changes_base=True,
    incremental=True,
    trained_as="turned",
    optimizers=NO_OPTIMIZER,
)


def flora(options: Options) -> Algorithm:
    """Return the algorithm; the fresh A of every round comes from `options.seed`."""

    def receive(layout: AdapterLayout, turn: Turn, state: SiteState, message: State) -> SiteState:
        adapter = {**state.adapter, **drift.without(message), **fresh(layout, turn, options.seed)}
        return SiteState(adapter, drift.from_message(layout, message))

    site = site_half()
    return Algorithm(
        "flora",
        TRAITS,
        SiteHalf(site.start, site.trained, receive, site.send, site.kept),
        server_half(send, aggregate, update),
        head,
        factors,
        lambda layout, turn, _since: head(layout, turn),
    )


def fresh(layout: AdapterLayout, turn: Turn, seed: int) -> State:
    """Return the pair that a round starts from: A uniform within ±1/√d_in, B zero, so the model is the base's."""
    return {name: _fresh(spec, turn, seed) for spec in layout.tensors if spec.role != "head" for name in (spec.name,)}


def send(layout: AdapterLayout, turn: Turn, state: ServerState, since: int) -> State:
    """Return the head and the increments of the base that the site lacks."""
    return {**select(state.adapter, head(layout, turn)), **drift.to_message(layout, state.memory, since)}


def aggregate(layout: AdapterLayout, turn: Turn, state: ServerState, gathered: Gathered) -> ServerState:
    """Remember the stack as the round's increment; the coordinator's own pair stays at zero."""
    increments = {A.layer: stacked(gathered.stack, A, B) for A, B in layout.pairs}
    return ServerState(state.adapter, state.optimizer, drift.remember(state.memory, turn.number, increments, layout))


def stacked(stack: Stack, spec_A: TensorSpec, spec_B: TensorSpec) -> Factors:
    """Return one layer's stack (A (R, d_in), B (d_out, R)), R = Σrᵢ and at most min(d_out, d_in)."""
    As, Bs = stack.tensors(spec_A.name), stack.tensors(spec_B.name)
    A = np.concatenate([share * np.asarray(A, np.float64) for share, A in zip(stack.shares, As, strict=True)])
    B = np.concatenate([np.asarray(B, np.float64) for B in Bs], axis=1)
    return rounded_pair(drift.trimmed(A, B), like=Bs[0])


def update(layout: AdapterLayout, state: ServerState) -> dict[str, Factors]:
    """Return the factors of the drift: all that was learnt is in the base."""
    return drift.after(layout, state.memory, 0)


def _fresh(spec: TensorSpec, turn: Turn, seed: int) -> np.ndarray:
    return uniform_A(spec, seed, "flora", turn.number) if spec.role == "lora_A" else np.zeros(spec.shape, np.float32)
