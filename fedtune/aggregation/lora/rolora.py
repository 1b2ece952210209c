"""`rolora`: train B in odd rounds and A in even ones. The mean update exactly, each round, and both factors move.

    site    odd round:  trains and sends B (d_out, r), head;  A (r, d_in) is the global one
            even round: trains and sends A, head;             B is the global one
    server  the mean of the factor that came, Σ pᵢ·Bᵢ or Σ pᵢ·Aᵢ
    exact   Σ pᵢ·Bᵢ·A = B̄·A and Σ pᵢ·B·Aᵢ = B·Ā

The first round trains B, because B starts at zero and passes A no gradient. A round's noise is on one factor: linear.
Traffic: the trained factor up; down what changed since the site's last round, which is one factor for a site that was
there and both for one that missed rounds. (A site that took the other factor from its own memory instead would train
beside a stale one: the mean would be exact no more.) Source: RoLoRA (arXiv 2502.01755).
"""

from __future__ import annotations

from fedtune.aggregation.lora.factors import only
from fedtune.aggregation.lora.linear import linear, union
from fedtune.aggregation.lora.protocol import Algorithm, Exactness, Options, Traits, Turn
from fedtune.model.layout import AdapterLayout

TRAITS = Traits(
    source="arXiv 2502.01755",
    exactness=Exactness("exact", "Σ pᵢ·Bᵢ·A = B̄·A in odd rounds, Σ pᵢ·B·Aᵢ = B·Ā in even ones"),
    linear=True,
    noisy=frozenset({"B"}),  # and A in even rounds: one at a time
    incremental=True,
    trained_as="alternating",
)


def rolora(_options: Options) -> Algorithm:
    """Return the algorithm: one factor and the head are trained and sent, in turns."""
    return linear("rolora", TRAITS, turn_of, changed)


def turn_of(layout: AdapterLayout, turn: Turn) -> AdapterLayout:
    """Return what a round trains: B and the head in odd rounds, A and the head in even ones."""
    return only(layout, "lora_B" if turn.number % 2 else "lora_A", "head")


def changed(layout: AdapterLayout, turn: Turn, since: int) -> AdapterLayout:
    """Return what the rounds after `since` and before this one have changed."""
    return union(*(turn_of(layout, Turn(number)) for number in range(max(since + 1, turn.number - 2), turn.number)))
