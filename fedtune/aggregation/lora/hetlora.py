"""`hetlora`: zero-pad to one rank, weight by the length of the update, average the factors. Not the mean update.

    site    the first rᵢ rows of the global A and columns of B; trains and sends Aᵢ (rᵢ, d_in), Bᵢ (d_out, rᵢ), head
    server  qᵢ = pᵢ·‖Bᵢ·Aᵢ‖_F / Σⱼ pⱼ·‖Bⱼ·Aⱼ‖_F, for each layer
            A ← Σ qᵢ·pad(Aᵢ),  B ← Σ qᵢ·pad(Bᵢ), both at the plan's rank; the head by pᵢ
    error   Σ qᵢ·Bᵢ·Aᵢ − B·A = Σ qᵢ·(pad(Bᵢ) − B)·(pad(Aᵢ) − A), and besides qᵢ ≠ pᵢ

The paper has qᵢ without pᵢ, which is the case of equal weights. Where every ‖Bᵢ·Aᵢ‖ is zero, qᵢ = pᵢ. The paper's
rank self-pruning is a term of the site's objective and no part of the aggregation.

The weight is what a site sends: an update made ten times as long counts ten times as much on top, a hundred times in
all. So it needs a bound on the update's length, and it is the wrong rule where a site is not trusted. ‖Bᵢ·Aᵢ‖_F comes
from thin QR, not from the product. The coordinator holds the K replies of a round. Under DP both factors are noisy:
ξ_B·ξ_A, and the noise lengthens ‖Bᵢ·Aᵢ‖ as well. Traffic: Pᵢ up, Pᵢ down. Source: HetLoRA (arXiv 2401.06432).
"""

# ruff: noqa: N803, N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedtune.aggregation.lora.factors import Array, Factors, fit_rank, rounded_pair
from fedtune.aggregation.lora.flexlora import send_cut
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.linear import adapter_update
from fedtune.aggregation.lora.protocol import NO_OPTIMIZER, Algorithm, Exactness, Options, ServerState, Traits, Turn
from fedtune.aggregation.lora.stacked import factors, head, server_half, site_half
from fedtune.model.layout import AdapterLayout

TRAITS = Traits(
    source="arXiv 2401.06432",
    exactness=Exactness("inexact", "B·A with A = Σ qᵢ·pad(Aᵢ), B = Σ qᵢ·pad(Bᵢ), qᵢ ∝ pᵢ·‖Bᵢ·Aᵢ‖_F"),
    linear=False,
    noisy=frozenset({"A", "B"}),
    ranks="any",
    optimizers=NO_OPTIMIZER,
)


def hetlora(_options: Options) -> Algorithm:
    """Return the algorithm: everything goes up, the first rows and columns of the average come down."""
    return Algorithm(
        "hetlora",
        TRAITS,
        site_half(),
        server_half(send_cut, aggregate, adapter_update),
        head,
        factors,
        lambda layout, _turn, _since: layout,
    )


def aggregate(layout: AdapterLayout, _turn: Turn, state: ServerState, gathered: Gathered) -> ServerState:
    """Replace every pair by the weighted average of the padded ones."""
    adapter, stack = dict(state.adapter), gathered.stack
    for spec_A, spec_B in layout.pairs:
        As, Bs = stack.tensors(spec_A.name), stack.tensors(spec_B.name)
        shares = length_shares(As, Bs, stack.shares)
        A, B = padded_mean(As, Bs, shares, spec_A.shape[0])
        adapter[spec_A.name], adapter[spec_B.name] = rounded_pair((A, B), like=Bs[0])
    return ServerState(adapter, state.optimizer, state.memory)


def length_shares(As: Sequence[Array], Bs: Sequence[Array], shares: Sequence[float]) -> list[float]:
    """Return qᵢ ∝ pᵢ·‖Bᵢ·Aᵢ‖_F with sum 1, or the pᵢ where every product is zero."""
    lengths = [share * product_norm(A, B) for A, B, share in zip(As, Bs, shares, strict=True)]
    total = math.fsum(lengths)
    return [length / total for length in lengths] if total else list(shares)


def product_norm(A: Array, B: Array) -> float:
    """Return ‖B·A‖_F as the norm of an (r, r) matrix, from the R of both thin QRs."""
    upper_A = np.linalg.qr(np.asarray(A, np.float64).T).R
    upper_B = np.linalg.qr(np.asarray(B, np.float64)).R
    return float(np.linalg.norm(upper_B @ upper_A.T))


def padded_mean(As: Sequence[Array], Bs: Sequence[Array], shares: Sequence[float], rank: int) -> Factors:
    """Return the averages of the factors, zero-padded to `rank`, in float64."""
    mean_A, mean_B = np.zeros((rank, As[0].shape[1])), np.zeros((Bs[0].shape[0], rank))
    for A, B, share in zip(As, Bs, shares, strict=True):
        padded_A, padded_B = fit_rank(A, B, rank)
        mean_A += share * padded_A
        mean_B += share * padded_B
    return mean_A, mean_B
