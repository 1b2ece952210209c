"""What the linear rules share: a site sends what it trained, the coordinator averages it, the optimiser moves.

The mean, the server optimiser and then the rule's own `finish` act in this order, so that the optimiser sees the basis
in which the sites trained. Knows no formula of any rule.
"""

from __future__ import annotations

from collections.abc import Callable

from fedtune.aggregation import server_optimizers
from fedtune.aggregation.lora.factors import Factors, State, nothing, select
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.protocol import (
    Algorithm,
    Layouts,
    ServerHalf,
    ServerState,
    SiteHalf,
    SiteState,
    Traits,
    Turn,
)
from fedtune.aggregation.server_optimizers import OptimizerState
from fedtune.config.schema import AggregationSettings
from fedtune.model.layout import AdapterLayout

Part = Callable[[AdapterLayout], AdapterLayout]
Changed = Callable[[AdapterLayout, Turn, int], AdapterLayout]
Finish = Callable[[AdapterLayout, ServerState], ServerState]


def linear(
    name: str,
    traits: Traits,
    averaged: Layouts,
    down: Changed,
    *,
    finish: Finish | None = None,
    kept: Part = lambda _layout: nothing(),
) -> Algorithm:
    """Return the algorithm whose sites train and send the tensors of `averaged`.

    `down` says which tensors may have changed since a round, `kept` what a site trains besides and never sends.
    """

    def trained(layout: AdapterLayout, turn: Turn) -> AdapterLayout:
        return union(averaged(layout, turn), kept(layout))

    def receive_at_server(
        settings: AggregationSettings, layout: AdapterLayout, _turn: Turn, state: ServerState, gathered: Gathered
    ) -> ServerState:
        moved = optimised(settings, state, gathered)
        return moved if finish is None else finish(layout, moved)

    def start(settings: AggregationSettings, layout: AdapterLayout, initial: State) -> ServerState:
        moving = union(averaged(layout, Turn(1)), averaged(layout, Turn(2)))  # what any round may move
        known = {name: initial[name] for name in moving.names}
        return ServerState(dict(initial), server_optimizers.init(settings, known))

    return Algorithm(
        name,
        traits,
        SiteHalf(start_site, trained, overlay, sender(averaged), kept),
        ServerHalf(start, server_sender(down), receive_at_server, adapter_update),
        averaged,
        lambda _layout, _turn: nothing(),
        down,
    )


def start_site(_layout: AdapterLayout, initial: State) -> SiteState:
    """Begin with what the plan's seed gives every machine."""
    return SiteState(dict(initial))


def overlay(_layout: AdapterLayout, _turn: Turn, state: SiteState, message: State) -> SiteState:
    """Take over the tensors that came; the others stay as the site has them."""
    return SiteState({**state.adapter, **message}, state.memory)


def sender(layouts: Layouts) -> Callable[[AdapterLayout, Turn, SiteState], State]:
    """Return the site's `send` that takes the tensors of a layout out of its adapter."""
    return lambda layout, turn, state: select(state.adapter, layouts(layout, turn))


def server_sender(down: Changed) -> Callable[[AdapterLayout, Turn, ServerState, int], State]:
    """Return the coordinator's `send` that takes what has changed out of its adapter."""
    return lambda layout, turn, state, since: select(state.adapter, down(layout, turn, since))


def optimised(settings: AggregationSettings, state: ServerState, gathered: Gathered) -> ServerState:
    """Move the adapter towards the mean; moments of tensors that nobody sent this time stay as they are."""
    moved, optimizer = server_optimizers.apply(settings, state.adapter, gathered.mean, state.optimizer)
    moments = {**state.optimizer.moments, **optimizer.moments}
    return ServerState({**state.adapter, **moved}, OptimizerState(optimizer.step, moments), state.memory)


def adapter_update(layout: AdapterLayout, state: ServerState) -> dict[str, Factors]:
    """Return the adapter's own factors: the base has not changed."""
    return {a.layer: (state.adapter[a.name], state.adapter[b.name]) for a, b in layout.pairs}


def union(*layouts: AdapterLayout) -> AdapterLayout:
    """Return the layout of every tensor that is in one of the layouts."""
    specs = {spec for layout in layouts for spec in layout.tensors}
    return AdapterLayout(tuple(sorted(specs, key=lambda spec: spec.name)))
