"""`fedit`: average the factors. The baseline, and not the mean update.

    site    trains and sends A (r, d_in), B (d_out, r), head
    server  Ā = Σ pᵢ·Aᵢ,  B̄ = Σ pᵢ·Bᵢ
    error   M − B̄·Ā = Σ pᵢ·(Bᵢ − B̄)·(Aᵢ − Ā),  M = Σ pᵢ·Bᵢ·Aᵢ

The error is the weighted covariance of the factors: zero with one site or where the sites share a factor, and of the
order of M where they drift apart. Under DP it also holds the mean of ξ_B·ξ_A. Traffic: P up, P down, P = r·(d_out +
d_in). Source: FedIT (arXiv 2305.05644).
"""

from __future__ import annotations

from fedtune.aggregation.lora.linear import linear
from fedtune.aggregation.lora.protocol import Algorithm, Exactness, Options, Traits

TRAITS = Traits(
    source="arXiv 2305.05644",
    exactness=Exactness("inexact", "M − B̄·Ā = Σ pᵢ·(Bᵢ − B̄)·(Aᵢ − Ā)"),
    linear=True,
    noisy=frozenset({"A", "B"}),
)


def fedit(_options: Options) -> Algorithm:
    """Return the algorithm: everything is trained, sent, averaged and sent back."""
    return linear("fedit", TRAITS, lambda layout, _turn: layout, lambda layout, _turn, _since: layout)
