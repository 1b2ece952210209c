"""SCAFFOLD's control variates beside an algorithm: one more tensor for each that is trained.

    down    the algorithm's message, and c
    up      the algorithm's message, and Δcᵢ = cᵢ⁺ − cᵢ
    server  c ← c + Σ pᵢ·Δcᵢ over who came

`variate/NAME` is c on the way down and Δcᵢ on the way up. What the variates do to a step, and why they cost no privacy,
is in `fedtune.aggregation.objectives`. A site keeps its own cᵢ. Source: SCAFFOLD (arXiv 1910.06378).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from fedtune.aggregation.lora.factors import State, plain
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.linear import union
from fedtune.aggregation.lora.protocol import Algorithm, Layouts, ServerState, SiteState, Turn
from fedtune.aggregation.objectives import next_common_variate
from fedtune.config.schema import AggregationSettings
from fedtune.model.layout import AdapterLayout, Array

COMMON: Final = "variate/"
OWN: Final = "own-variate/"


def with_variates(algorithm: Algorithm) -> Algorithm:
    """Return the algorithm whose messages carry variates of all that it trains; `traits.exchanges` must be 1."""
    site, server = algorithm.site, algorithm.server

    def variates(layout: AdapterLayout, turn: Turn) -> AdapterLayout:
        specs = (plain(COMMON + spec.name, spec.shape) for spec in site.trained(layout, turn).tensors)
        return AdapterLayout(tuple(sorted(specs, key=lambda spec: spec.name)))

    def start(settings: AggregationSettings, layout: AdapterLayout, initial: State) -> ServerState:
        state = server.start(settings, layout, initial)
        zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in variates(layout, Turn(1)).tensors}
        return replace(state, memory={**state.memory, **zeros})

    def receive(layout: AdapterLayout, turn: Turn, state: SiteState, message: State) -> SiteState:
        received = site.receive(layout, turn, state, _others(message))
        return replace(received, memory={**received.memory, **_variates(message)})

    def receive_at_server(
        settings: AggregationSettings, layout: AdapterLayout, turn: Turn, state: ServerState, gathered: Gathered
    ) -> ServerState:
        common, change = _variates(state.memory), _variates(gathered.mean)
        moved = next_common_variate(common, change, min(1.0, gathered.weight))
        without = replace(gathered, mean=_others(gathered.mean))
        after = server.receive(settings, layout, turn, replace(state, memory=_others(state.memory)), without)
        return replace(after, memory={**after.memory, **moved})

    return replace(
        algorithm,
        averaged=_beside(algorithm.averaged, variates),
        down=lambda layout, turn, since: union(algorithm.down(layout, turn, since), variates(layout, turn)),
        site=replace(
            site,
            receive=receive,
            send=lambda layout, turn, state: {**site.send(layout, turn, state), **_variates(state.memory)},
        ),
        server=replace(
            server,
            start=start,
            send=lambda layout, turn, state, since: {
                **server.send(layout, turn, state, since),
                **_variates(state.memory),
            },
            receive=receive_at_server,
        ),
    )


def variates_of(state: State, prefix: str) -> dict[str, Array]:
    """Return what stands under a prefix, by the names of the trained tensors."""
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}


def _beside(first: Layouts, second: Layouts) -> Layouts:
    return lambda layout, turn: union(first(layout, turn), second(layout, turn))


def _variates(state: State) -> State:
    return {name: array for name, array in state.items() if name.startswith(COMMON)}


def _others(state: State) -> State:
    return {name: array for name, array in state.items() if not name.startswith(COMMON)}
