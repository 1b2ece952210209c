"""`fedsa`: share A, keep B. A personal model at every site and no global one.

    site    trains A (r, d_in), B (d_out, r), head; sends A and head; B never leaves the site
    server  Ā = Σ pᵢ·Aᵢ
    result  site i goes on with W0 + s·Bᵢ·Ā

There is no mean update to be exact against: each site multiplies Ā by its own Bᵢ, and nothing can be released from
the coordinator's state alone. Under DP, B needs the same noise as A although it stays: the gradient of A at the next
step is made with B, so an unprotected B would leak through A. Both factors are noisy and meet in Bᵢ·Ā.
Traffic: r·d_in up, r·d_in down. Source: FedSA-LoRA (arXiv 2410.01463).
"""

from __future__ import annotations

from dataclasses import replace

from fedtune.aggregation.lora.factors import Factors, only
from fedtune.aggregation.lora.linear import linear
from fedtune.aggregation.lora.protocol import Algorithm, Exactness, Options, ServerState, Traits
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout

TRAITS = Traits(
    source="arXiv 2410.01463",
    exactness=Exactness("personal", "site i holds Bᵢ·Ā; there is no global update"),
    linear=True,
    noisy=frozenset({"A", "B"}),
    releases=False,
)


def fedsa(_options: Options) -> Algorithm:
    """Return the algorithm: A and the head travel, B is trained and kept."""
    algorithm = linear(
        "fedsa",
        TRAITS,
        lambda layout, _turn: only(layout, "lora_A", "head"),
        lambda layout, _turn, _since: only(layout, "lora_A", "head"),
        kept=lambda layout: only(layout, "lora_B"),
    )
    return replace(algorithm, server=replace(algorithm.server, update=no_update))


def no_update(_layout: AdapterLayout, _state: ServerState) -> dict[str, Factors]:
    """Refuse: the factors B are at the sites (`no-global-adapter`)."""
    raise AggregationError(
        "no-global-adapter",
        "fedsa keeps every site's B at the site, so the coordinator has no adapter to release",
        hint="evaluate and export at the sites, or use aggregation.algorithm=fedsvd for a global adapter",
    )
