"""An algorithm whose mean is a robust rule: the same messages, another answer to what the sites sent.

Where one factor travels, ΔW is linear in it and the rule acts on its entries (`robust_state`); its answer takes the
place of the mean, and the server optimiser and the algorithm go on as ever. `flexlora` sends both factors, whose
entries mean nothing, so the rule acts on the products and the best adapter of the blend takes the place of the stack.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtune.aggregation.lora.factors import Array, State, nothing, select
from fedtune.aggregation.lora.gather import Gathered, Stack
from fedtune.aggregation.lora.linear import union
from fedtune.aggregation.lora.protocol import Algorithm, ServerState, Turn
from fedtune.aggregation.robust.rules import RobustRule, blended, product_blend, robust_state
from fedtune.config.schema import AggregationSettings
from fedtune.model.layout import AdapterLayout


@dataclass(frozen=True, slots=True)
class OneReply:
    """A stack of the one reply that the robust rule has made of all."""

    reply: State
    shares: tuple[float, ...] = (1.0,)

    def tensors(self, name: str) -> list[Array]:
        """Return the tensor."""
        return [self.reply[name]]


def with_robust_rule(algorithm: Algorithm, rule: RobustRule, scale: float) -> Algorithm:
    """Return the algorithm with `rule` in the place of the mean; `scale` is alpha / rank.

    All replies of an exchange are held until its end. Errors, when an exchange ends: those of `robust_state` and
    `product_blend`.
    """

    def sent(layout: AdapterLayout, turn: Turn) -> AdapterLayout:
        return union(algorithm.averaged(layout, turn), algorithm.stacked(layout, turn))

    def receive(
        settings: AggregationSettings, layout: AdapterLayout, turn: Turn, state: ServerState, gathered: Gathered
    ) -> ServerState:
        part = sent(layout, turn)
        both = {"lora_A", "lora_B"} <= {spec.role for spec in part.tensors}
        answer = (_of_products if both else _of_entries)(rule, part, gathered.stack, state, scale)
        means = select(answer, algorithm.averaged(layout, turn))
        robust = Gathered(means, OneReply(answer), gathered.weight)
        return algorithm.server.receive(settings, layout, turn, state, robust)

    return replace(
        algorithm,
        traits=replace(algorithm.traits, linear=False),
        averaged=lambda _layout, _turn: nothing(),
        stacked=sent,
        server=replace(algorithm.server, receive=receive),
    )


def _of_entries(rule: RobustRule, part: AdapterLayout, stack: Stack, state: ServerState, _scale: float) -> State:
    return robust_state(rule, part, stack, state.adapter)


def _of_products(rule: RobustRule, part: AdapterLayout, stack: Stack, state: ServerState, scale: float) -> State:
    blend = product_blend(rule, part, stack, state.adapter, scale=scale)
    return blended(blend, part, stack, state.adapter)
