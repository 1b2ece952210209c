"""What the rules share that need every site's factors: all is trained and sent, and no server optimiser acts.

Knows no formula of any rule.
"""

from __future__ import annotations

from collections.abc import Callable

from fedtune.aggregation.lora.factors import Factors, State, only
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.linear import overlay, sender, start_site
from fedtune.aggregation.lora.protocol import Layouts, ServerHalf, ServerState, SiteHalf, Turn
from fedtune.aggregation.server_optimizers import OptimizerState
from fedtune.config.schema import AggregationSettings
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout

Aggregate = Callable[[AdapterLayout, Turn, ServerState, Gathered], ServerState]


def everything(layout: AdapterLayout, _turn: Turn) -> AdapterLayout:
    """Return the whole layout: A, B and the head."""
    return layout


def factors(layout: AdapterLayout, _turn: Turn) -> AdapterLayout:
    """Return the layout of A and B."""
    return only(layout, "lora_A", "lora_B")


def head(layout: AdapterLayout, _turn: Turn) -> AdapterLayout:
    """Return the layout of the head."""
    return only(layout, "head")


def site_half(trained: Layouts = everything) -> SiteHalf:
    """Return the site's half that sends all tensors of its layout and keeps nothing."""
    return SiteHalf(start_site, trained, overlay, sender(everything), lambda _layout: AdapterLayout(()))


def server_half(
    send: Callable[[AdapterLayout, Turn, ServerState, int], State],
    aggregate: Aggregate,
    update: Callable[[AdapterLayout, ServerState], dict[str, Factors]],
) -> ServerHalf:
    """Return the coordinator's half that takes the mean for what can be averaged, then aggregates the stack."""

    def receive(
        settings: AggregationSettings, layout: AdapterLayout, turn: Turn, state: ServerState, gathered: Gathered
    ) -> ServerState:
        refuse_optimizer(settings)
        optimizer = OptimizerState(state.optimizer.step + (turn.part == 0), state.optimizer.moments)
        adapter = {name: gathered.mean.get(name, array) for name, array in state.adapter.items()}
        return aggregate(layout, turn, ServerState(adapter, optimizer, state.memory), gathered)

    return ServerHalf(start, send, receive, update)


def start(settings: AggregationSettings, _layout: AdapterLayout, initial: State) -> ServerState:
    """Begin with the initial adapter and no moments; `optimizer-with-stack` where the plan asks for any."""
    refuse_optimizer(settings)
    return ServerState(dict(initial), OptimizerState(0, {}))


def refuse_optimizer(settings: AggregationSettings) -> None:
    """Refuse a server optimiser: every round has new factors, so a step between them or a moment means nothing.

    Error: `optimizer-with-stack`.
    """
    if settings.server_optimizer != "fedavg" or settings.server_learning_rate != 1:
        raise AggregationError(
            "optimizer-with-stack",
            f"{settings.algorithm} builds new factors every round, and {settings.server_optimizer} at learning rate "
            f"{settings.server_learning_rate:g} moves the old ones",
            hint="use aggregation.server_optimizer=fedavg with aggregation.server_learning_rate=1, or "
            "aggregation.algorithm=ffa",
        )
