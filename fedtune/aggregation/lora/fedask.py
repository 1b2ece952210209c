"""`fedask`: find the mean update by a randomised SVD over two exchanges. Both factors move, and all sums are linear.

    part 0  site    trains B (d_out, r), head, and with `train_both` A (r, d_in); sends Yᵢ = Bᵢ·(Aᵢ·Ω) (d_out, ℓ)
            server  Q = orthonormal columns of Σ pᵢ·Yᵢ (d_out, ℓ)
    part 1  site    sends Pᵢ = Aᵢᵀ·(Bᵢᵀ·Q) (d_in, ℓ) and the head; trains nothing
            server  Q·(Σ pᵢ·Pᵢ)ᵀ = Q·Qᵀ·M = U·Σ·Vᵀ at rank r:  A ← Vᵀ,  B ← U·Σ
    exact   almost surely when rank M ≤ r, and then ℓ ≥ rank M holds; else the best rank r of Q·Qᵀ·M

Ω (d_in, ℓ) is drawn from the seed, the round and the layer, ℓ = r + `oversampling`. Beside a frozen A, M = B̄·A has
rank ≤ r: exact, and only one factor is noisy. With `train_both` the rank is up to K·r, and ξ_B·ξ_A meet.

Both exchanges need the same sites at the same weights. If a site leaves in between, Q spans the range of another mean
than the one it is applied to, and a part of the update is lost without a sound; the exchange must be done again.
Part 1 is post-processing of what part 0 trained and released nothing of: under DP it is free only because what was
trained carries its noise already, so nothing may be trained again. A ← Vᵀ instead of the paper's even √Σ on both
sides: the product is the same, and a direction without a singular value keeps a unit row instead of dying.
Traffic: d_out·ℓ + d_in·ℓ up, P + d_out·ℓ down. Source: FedASK (arXiv 2507.09990).
"""

# ruff: noqa: N803, N806
# A, B, Q, Y and P are the matrices' names in the paper.

from __future__ import annotations

from typing import Final

import numpy as np

from fedtune.aggregation.algebra import best_rank
from fedtune.aggregation.lora.draws import gaussian_sketch
from fedtune.aggregation.lora.factors import Array, State, nothing, only, plain, rounded, select
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.linear import adapter_update, overlay, start_site, union
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
from fedtune.aggregation.lora.stacked import server_half
from fedtune.model.layout import AdapterLayout, TensorSpec

SKETCH: Final = "sketch/"
PROJECTION: Final = "projection/"


def fedask(options: Options) -> Algorithm:
    """Return the algorithm; `options` give the seed, the oversampling and whether A is trained."""

    def trained(layout: AdapterLayout, turn: Turn) -> AdapterLayout:
        if turn.part:
            return nothing()
        return layout if options.train_both else only(layout, "lora_B", "head")

    def send(layout: AdapterLayout, turn: Turn, state: SiteState) -> State:
        return projections(layout, state) if turn.part else sketches(layout, turn, state, options)

    return Algorithm(
        "fedask",
        traits(options),
        SiteHalf(start_site, trained, receive, send, lambda _layout: nothing()),
        server_half(send_down, aggregate, adapter_update),
        lambda layout, turn: (projection_layout if turn.part else sketch_layout)(layout, options.oversampling),
        lambda _layout, _turn: nothing(),
        lambda layout, turn, _since: basis_layout(layout, options.oversampling) if turn.part else layout,
    )


def traits(options: Options) -> Traits:
    """Return what the algorithm is, which depends on whether A is trained."""
    exact = Exactness("almost surely", "Q·Qᵀ·B̄·A = B̄·A, as ℓ > r ≥ rank(B̄·A)")
    best = Exactness("up to rank", "the best rank r of Q·Qᵀ·M; equals M almost surely when rank M ≤ r")
    return Traits(
        source="arXiv 2507.09990",
        exactness=best if options.train_both else exact,
        linear=True,
        noisy=frozenset({"A", "B"}) if options.train_both else frozenset({"B"}),
        trained_as="turned",
        exchanges=2,
        optimizers=NO_OPTIMIZER,
    )


def receive(layout: AdapterLayout, turn: Turn, state: SiteState, message: State) -> SiteState:
    """Take the global adapter in part 0, and in part 1 the bases Q beside what was trained."""
    return SiteState(state.adapter, dict(message)) if turn.part else overlay(layout, turn, state, message)


def sketches(layout: AdapterLayout, turn: Turn, state: SiteState, options: Options) -> State:
    """Return Yᵢ = Bᵢ·(Aᵢ·Ω) of each layer."""
    message = {}
    for spec_A, spec_B in layout.pairs:
        A, B = _wide(state.adapter[spec_A.name]), state.adapter[spec_B.name]
        width = spec_A.shape[0] + options.oversampling
        omega = gaussian_sketch(spec_A.shape[1], width, options.seed, turn.number, spec_A.layer)
        message[SKETCH + spec_A.layer] = rounded(_wide(B) @ (A @ omega), like=B)
    return message


def projections(layout: AdapterLayout, state: SiteState) -> State:
    """Return the head, and Pᵢ = Aᵢᵀ·(Bᵢᵀ·Q) of each layer."""
    message = select(state.adapter, only(layout, "head"))
    for spec_A, spec_B in layout.pairs:
        A, B = _wide(state.adapter[spec_A.name]), state.adapter[spec_B.name]
        Q = _wide(state.memory[SKETCH + spec_A.layer])
        message[PROJECTION + spec_A.layer] = rounded(A.T @ (_wide(B).T @ Q), like=B)
    return message


def send_down(layout: AdapterLayout, turn: Turn, state: ServerState, _since: int) -> State:
    """Return the global adapter in part 0, the bases Q in part 1."""
    if turn.part == 0:
        return select(state.adapter, layout)
    return {SKETCH + A.layer: state.memory[SKETCH + A.layer] for A, _ in layout.pairs}


def aggregate(layout: AdapterLayout, turn: Turn, state: ServerState, gathered: Gathered) -> ServerState:
    """Make the bases Q of the mean sketches in part 0, the new factors of the mean projections in part 1."""
    if turn.part == 0:
        means = {SKETCH + A.layer: gathered.mean[SKETCH + A.layer] for A, _ in layout.pairs}
        bases = {name: rounded(np.linalg.qr(_wide(Y))[0], like=Y) for name, Y in means.items()}
        return ServerState(state.adapter, state.optimizer, bases)
    adapter = dict(state.adapter)
    for spec_A, spec_B in layout.pairs:
        Q, P = state.memory[SKETCH + spec_A.layer], gathered.mean[PROJECTION + spec_A.layer]
        A, B = best_rank([P.T], [Q], [1.0], spec_A.shape[0])
        adapter[spec_A.name], adapter[spec_B.name] = rounded(A, like=P), rounded(B, like=P)
    return ServerState(adapter, state.optimizer)


def sketch_layout(layout: AdapterLayout, oversampling: int) -> AdapterLayout:
    """Return the layout of the sketches Yᵢ (d_out, ℓ)."""
    return _plain({SKETCH + A.layer: (B.shape[0], A.shape[0] + oversampling) for A, B in layout.pairs})


def basis_layout(layout: AdapterLayout, oversampling: int) -> AdapterLayout:
    """Return the layout of the bases Q (d_out, min(ℓ, d_out))."""
    return _plain({SKETCH + A.layer: (B.shape[0], _columns(A, B, oversampling)) for A, B in layout.pairs})


def projection_layout(layout: AdapterLayout, oversampling: int) -> AdapterLayout:
    """Return the layout of the projections Pᵢ (d_in, min(ℓ, d_out)) and the head."""
    shapes = {PROJECTION + A.layer: (A.shape[1], _columns(A, B, oversampling)) for A, B in layout.pairs}
    return union(_plain(shapes), only(layout, "head"))


def _columns(spec_A: TensorSpec, spec_B: TensorSpec, oversampling: int) -> int:
    return min(spec_A.shape[0] + oversampling, spec_B.shape[0])


def _plain(shapes: dict[str, tuple[int, int]]) -> AdapterLayout:
    return AdapterLayout(tuple(plain(name, shape) for name, shape in sorted(shapes.items())))


def _wide(array: Array) -> Array:
    return np.asarray(array, np.float64)
