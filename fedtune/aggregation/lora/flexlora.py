"""`flexlora`: the best adapter of a rank. Sites of any rank; exact where the rank allows it.

    site    trains and sends Aᵢ (rᵢ, d_in), Bᵢ (d_out, rᵢ), head
    server  M = Σ pᵢ·Bᵢ·Aᵢ ≈ U·Σ·Vᵀ at the plan's rank r:  A ← Vᵀ,  B ← U·Σ
    site    the first rᵢ rows of A and columns of B
    error   ‖M − B·A‖_F² = Σ_{k>r} σ_k(M)², the least of any rank-r matrix (Eckart and Young, 1936)

Exact when M has no more than r singular values above zero, as with one site or few sites of small rank. M is never
formed: thin QR of the stacked factors, then the SVD of a matrix of at most (Σrᵢ, Σrᵢ), which costs O((d_out + d_in)·
(Σrᵢ)²) instead of O(d_out·d_in·min(d_out, d_in)). Singular values fall, so cutting to a site's rank is the best choice
of that rank again. Rows of A without a singular value are orthonormal all the same, never zero: what has learnt nothing
yet can still learn.

The coordinator holds the K replies of a round. Under DP both factors are noisy: ξ_B·ξ_A. Traffic: Pᵢ up, Pᵢ down.
Source: FlexLoRA (arXiv 2402.11505), there by a dense SVD.
"""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from fedtune.aggregation.algebra import best_rank
from fedtune.aggregation.lora.factors import State, fit_rank, rounded_pair, select
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.linear import adapter_update
from fedtune.aggregation.lora.protocol import NO_OPTIMIZER, Algorithm, Exactness, Options, ServerState, Traits, Turn
from fedtune.aggregation.lora.stacked import factors, head, server_half, site_half
from fedtune.model.layout import AdapterLayout

TRAITS = Traits(
    source="arXiv 2402.11505",
    exactness=Exactness("up to rank", "‖M − B·A‖_F² = Σ_{k>r} σ_k(M)², the least of any rank-r matrix"),
    linear=False,
    noisy=frozenset({"A", "B"}),
    ranks="any",
    trained_as="turned",
    optimizers=NO_OPTIMIZER,
)


def flexlora(_options: Options) -> Algorithm:
    """Return the algorithm: everything goes up, the best adapter of the site's rank comes down."""
    return Algorithm(
        "flexlora",
        TRAITS,
        site_half(),
        server_half(send_cut, aggregate, adapter_update),
        head,
        factors,
        lambda layout, _turn, _since: layout,
    )


def send_cut(layout: AdapterLayout, turn: Turn, state: ServerState, _since: int) -> State:
    """Return the head, and the global pair cut (or zero-padded) to the rank of the site's layout."""
    message = select(state.adapter, head(layout, turn))
    for spec_A, spec_B in layout.pairs:
        A, B = fit_rank(state.adapter[spec_A.name], state.adapter[spec_B.name], spec_A.shape[0])
        message[spec_A.name], message[spec_B.name] = A, B
    return message


def aggregate(layout: AdapterLayout, _turn: Turn, state: ServerState, gathered: Gathered) -> ServerState:
    """Replace every pair by the best one of the layout's rank."""
    adapter, stack = dict(state.adapter), gathered.stack
    for spec_A, spec_B in layout.pairs:
        As, Bs = stack.tensors(spec_A.name), stack.tensors(spec_B.name)
        A, B = best_rank(As, Bs, stack.shares, spec_A.shape[0])
        adapter[spec_A.name], adapter[spec_B.name] = rounded_pair((A, B), like=Bs[0])
    return ServerState(adapter, state.optimizer, state.memory)
