"""`ffa`: freeze A, average B. The mean update exactly, in half the traffic.

    site    trains and sends B (d_out, r), head; A (r, d_in) is what the plan's seed drew on every machine
    server  B̄ = Σ pᵢ·Bᵢ
    exact   Σ pᵢ·Bᵢ·A = B̄·A

A is never sent either way, so nobody can change it. What the sites learn stays in the row space of A. Noise on B
reaches W as ξ_B·A, linear. Traffic: r·d_out up, r·d_out down. Source: FFA-LoRA (arXiv 2403.12313).
"""

from __future__ import annotations

from fedtune.aggregation.lora.factors import only
from fedtune.aggregation.lora.linear import linear
from fedtune.aggregation.lora.protocol import Algorithm, Exactness, Options, Traits
from fedtune.model.layout import AdapterLayout

TRAITS = Traits(
    source="arXiv 2403.12313",
    exactness=Exactness("exact", "Σ pᵢ·Bᵢ·A = B̄·A, the same A at all sites"),
    linear=True,
    noisy=frozenset({"B"}),
)


def ffa(_options: Options) -> Algorithm:
    """Return the algorithm: only B and the head are trained and travel."""
    return linear(
        "ffa", TRAITS, lambda layout, _turn: without_A(layout), lambda layout, _turn, _since: without_A(layout)
    )


def without_A(layout: AdapterLayout) -> AdapterLayout:  # noqa: N802 - A is the factor's name
    """Return the layout of B and the head."""
    return only(layout, "lora_B", "head")
