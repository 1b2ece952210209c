"""A site's half of one exchange: from an instruction to what training starts from, and from what was trained to bytes.

What a coordinator sends is checked against the plan's algorithm first: exactly the tensors that it sends down, finite,
of this site's shapes. A frozen factor is never taken from a message. Knows no journal and no record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregation.assembly import assemble, codec_of
from fedtune.aggregation.lora import drift
from fedtune.aggregation.lora.factors import State, select
from fedtune.aggregation.lora.protocol import Algorithm, SiteState, Turn
from fedtune.aggregation.lora.variates import COMMON, OWN, variates_of
from fedtune.aggregation.validation import validate
from fedtune.config.plan import StudyPlan
from fedtune.errors import MessageError
from fedtune.flower.messages import Instruction
from fedtune.model.layout import INCREMENT, AdapterLayout, AdapterState, Array
from fedtune.model.workspace import Workspace
from fedtune.privacy.random import RandomSource, SecureSource, SeededSource
from fedtune.training.local import LocalResult
from fedtune.training.site_objective import Variates
from fedtune_client.site import Site

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange as it stands before anything is trained: `state` is what was received, `kept` the site's own."""

    plan: StudyPlan
    algorithm: Algorithm
    workspace: Workspace
    turn: Turn
    state: SiteState
    kept: Arrays
    counted: int

    @property
    def layout(self) -> AdapterLayout:
        """The adapter's layout at the site's rank."""
        return self.workspace.layout

    @property
    def trained(self) -> AdapterLayout:
        """What the optimiser may change."""
        return self.algorithm.site.trained(self.layout, self.turn)

    @property
    def start(self) -> AdapterState:
        """The whole adapter that training and evaluation start from, increments of the base included."""
        increments = {name: array for name, array in self.state.memory.items() if name.startswith(INCREMENT)}
        own = {name: self.kept[name] for name in self.algorithm.site.kept(self.layout).names if name in self.kept}
        return {**self.state.adapter, **own, **increments}

    @property
    def variates(self) -> Variates | None:
        """SCAFFOLD's variates, by the names of the trained tensors; None for a plan without them."""
        common = variates_of(self.state.memory, COMMON)
        return Variates(common, variates_of(self.kept, OWN)) if common else None

    @property
    def sent_later(self) -> AdapterState:
        """What was received of the tensors that later exchanges of the round send: codecs take differences from it."""
        turns = [Turn(self.turn.number, part) for part in range(1, self.algorithm.traits.exchanges)]
        names = {name for turn in turns for name in self.algorithm.up(self.layout, turn).names}
        return {name: array for name, array in self.state.adapter.items() if name in names}

    def on_top_of(self, received: AdapterState) -> Exchange:
        """Return this exchange, a later one of its round, on top of what the first one brought."""
        return replace(self, state=SiteState({**self.state.adapter, **received}, self.state.memory))

    def inputs(self) -> Arrays:
        """Return everything that the round's result depends on besides the plan and the records."""
        return {**self.start, **self.state.memory, **{f"kept/{name}": array for name, array in self.kept.items()}}


def received(site: Site, instruction: Instruction, number: int) -> Exchange:
    """Return the exchange that an instruction begins; `number` is the round whose start it is.

    What it brings is kept under its mark. Errors: `message.*` and `aggregation.not-finite` for what no coordinator of
    the plan sends, `message.lacks-state`.
    """
    standing, algorithm = instruction.standing, algorithm_of(site.plan)
    _check_standing(site.plan, algorithm, instruction, site.most_rank or site.plan.lora.rank)
    workspace = site.open_workspace(standing.rank)
    layout, turn = workspace.layout, Turn(number, standing.part)
    message = instruction.adapter
    _check(message, algorithm.down(layout, turn, standing.since), workspace, algorithm)
    held = _held(site, instruction, algorithm, workspace)
    state = algorithm.site.receive(layout, turn, held, message)
    if algorithm.traits.changes_base:
        state = SiteState(state.adapter, drift.join(layout, held.memory, state.memory))
    if standing.mark:
        site.received.keep(standing.mark, state.adapter, state.memory)
    return Exchange(site.plan, algorithm, workspace, turn, state, site.kept.after(standing.counted), standing.counted)


def algorithm_of(plan: StudyPlan) -> Algorithm:
    """Return the plan's algorithm."""
    return assemble(plan.aggregation, plan.training, plan.lora, plan.seed)


def to_send(site: Site, exchange: Exchange, trained: SiteState) -> tuple[Arrays, Arrays]:
    """Return what goes up after this exchange, as the plan has it written, and the residuals to keep.

    Written after the noise, so under privacy it is post-processing.
    """
    layout, turn = exchange.layout, exchange.turn
    message = exchange.algorithm.site.send(layout, turn, trained)
    codec = codec_of(site.plan.aggregation)
    if codec is None:
        return message, {}
    up = exchange.algorithm.up(layout, turn)
    reference = {
        spec.name: exchange.state.adapter.get(spec.name, np.zeros(spec.shape, np.float32)) for spec in up.tensors
    }
    payload, memory = codec.encode(message, reference, up, _residuals(exchange.kept), _source(site, turn))
    return payload.arrays, memory


def after_training(exchange: Exchange, result: LocalResult) -> SiteState:
    """Return the state that the site's message is made of."""
    change = {COMMON + name: array for name, array in result.variate_change.items()}
    return SiteState({**exchange.start, **result.state}, {**exchange.state.memory, **change})


def to_keep(exchange: Exchange, trained: SiteState, result: LocalResult, residuals: Arrays) -> dict[str, NDArray[Any]]:
    """Return what the site keeps for its next round and sends to nobody as it is."""
    own = select(trained.adapter, exchange.algorithm.site.kept(exchange.layout))
    variates = {OWN + name: array for name, array in result.variate.items()}
    return {**own, **variates, **residuals}


def _held(site: Site, instruction: Instruction, algorithm: Algorithm, workspace: Workspace) -> SiteState:
    """Return the state that a message builds on: the plan's start, or what the site has kept under the named mark."""
    if not instruction.standing.base:
        return algorithm.site.start(workspace.layout, workspace.initial)
    return SiteState(*site.received.get(instruction.standing.base))


def _check_standing(plan: StudyPlan, algorithm: Algorithm, instruction: Instruction, most_rank: int) -> None:
    """Refuse a part that the plan does not have, and a rank that neither the plan nor this machine allows."""
    standing, lora = instruction.standing, plan.lora
    ranks = {0, lora.rank} if lora.ranks is None else {0, *lora.ranks} if isinstance(lora.ranks, tuple) else None
    fits = standing.rank in ranks if ranks is not None else lora.min_rank <= standing.rank <= most_rank
    if not fits or not 0 <= standing.part < algorithm.traits.exchanges:
        raise MessageError("wrong-field", "the plan has no such rank or exchange")
    if (standing.base or standing.mark or standing.since) and not algorithm.traits.incremental:
        raise MessageError("wrong-field", "the plan's algorithm sends whole adapters, and this is a part of one")


def _check(message: State, down: AdapterLayout, workspace: Workspace, algorithm: Algorithm) -> None:
    """Refuse an adapter that is not exactly what the plan's algorithm sends down."""
    plain = drift.without(message) if algorithm.traits.changes_base else message
    reference = {spec.name: workspace.initial.get(spec.name, np.zeros(spec.shape, np.float32)) for spec in down.tensors}
    validate(plain, down, max_norm=math.inf, reference=reference)


def _residuals(kept: Arrays) -> dict[str, Array]:
    return {name: array for name, array in kept.items() if name.startswith("residual/")}


def _source(site: Site, turn: Turn) -> RandomSource:
    """Return the source of the rounding, which has nothing to do with any record."""
    if site.plan.promise.mode == "dp" and site.plan.promise.noise == "secure":
        return SecureSource()
    return SeededSource("compression", site.plan.seed, site.plan.sha256, site.name, turn.number, turn.part)
