"""What the coordinator sends to a site, expects back from it, and makes of all that came: the algorithm, site by site.

Sites may differ in rank, and in what they have kept of earlier rounds. Knows no message format and no network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregation.assembly import assemble, codec_of
from fedtune.aggregation.compression.codec import Codec
from fedtune.aggregation.compression.payload import Payload
from fedtune.aggregation.lora.factors import State, at_rank
from fedtune.aggregation.lora.gather import Collector, Gathered
from fedtune.aggregation.lora.protocol import Algorithm, ServerState, SiteState, Turn
from fedtune.aggregation.validation import validate
from fedtune.config.plan import StudyPlan
from fedtune.flower.messages import Instruction, Standing
from fedtune.model.layout import INCREMENT, AdapterLayout, AdapterState
from fedtune_server.facts import SiteFacts

_MARK_SIGNS = 32


@dataclass(frozen=True, slots=True)
class Merging:
    """A study's algorithm with its layout and start; `initial` is what the plan gives every machine."""

    plan: StudyPlan
    layout: AdapterLayout
    initial: AdapterState
    algorithm: Algorithm
    codec: Codec | None

    @classmethod
    def of(cls, plan: StudyPlan, layout: AdapterLayout, initial: AdapterState) -> Merging:
        """Return the merging that a plan says."""
        algorithm = assemble(plan.aggregation, plan.training, plan.lora, plan.seed)
        return cls(plan, layout, initial, algorithm, codec_of(plan.aggregation))

    def start(self) -> ServerState:
        """Return the state before the first round."""
        return self.algorithm.server.start(self.plan.aggregation, self.layout, self.initial)

    def finish(self, turn: Turn, state: ServerState, gathered: Gathered) -> ServerState:
        """Return the state after an exchange."""
        return self.algorithm.server.receive(self.plan.aggregation, self.layout, turn, state, gathered)

    def collector(self, turn: Turn, folder: Path) -> Collector:
        """Return what takes the replies of an exchange; what is too large for memory goes to a file in `folder`."""
        averaged, stacked = self.algorithm.averaged(self.layout, turn), self.algorithm.stacked(self.layout, turn)
        return Collector(averaged, stacked, folder=folder)

    def as_site_holds(self, state: ServerState, number: int) -> AdapterState:
        """Return the whole adapter, increments of the base included, with which a site begins round `number` + 1."""
        return whole(self._received(self.layout, Turn(number + 1), state))

    def exchange(self, turn: Turn, state: ServerState) -> Sending:
        """Return the messages of one exchange."""
        return Sending(self, turn, state)

    def at(self, rank: int) -> AdapterLayout:
        """Return the layout at a site's rank; 0 is the plan's."""
        return self.layout if rank in {0, self.plan.lora.rank} else at_rank(self.layout, rank)

    def _received(self, layout: AdapterLayout, turn: Turn, state: ServerState) -> SiteState:
        site = self.algorithm.site
        initial = self.initial if layout is self.layout else _shaped(self.initial, layout)
        begun = site.start(layout, initial)
        first = Turn(turn.number)
        if turn.part:  # the later exchanges of a round start from what the first one brought
            begun = site.receive(layout, first, begun, self.algorithm.server.send(layout, first, state, 0))
        return site.receive(layout, turn, begun, self.algorithm.server.send(layout, turn, state, 0))


@dataclass(frozen=True, slots=True)
class Sending:
    """One exchange: what sites of each rank and history are sent, each made once, and what may come back."""

    merging: Merging
    turn: Turn
    state: ServerState
    _messages: dict[tuple[int, int], State] = field(default_factory=dict)
    _references: dict[int, AdapterState] = field(default_factory=dict)
    _marks: dict[int, str] = field(default_factory=dict)

    def message(self, rank: int, since: int) -> State:
        """Return the message to a site of a rank that has kept the outcome of the rounds up to `since`."""
        key = rank, since
        if key not in self._messages:
            layout = self.merging.at(rank)
            self._messages[key] = self.merging.algorithm.server.send(layout, self.turn, self.state, since)
        return self._messages[key]

    def instruction(self, site: SiteFacts, number: int) -> Instruction:
        """Return what a site is told in round `number`, on top of what it has kept."""
        standing = Standing(self.turn.part, site.rank, site.counted, site.holds, site.mark, self.mark(site.rank))
        message = self.message(site.rank, site.holds)
        return Instruction(self.merging.plan.sha256, number, message, standing=standing)

    def mark(self, rank: int) -> str:
        """Return the name under which a site of a rank keeps what the message makes; empty where it keeps nothing."""
        if not self.merging.algorithm.traits.incremental:
            return ""
        if rank not in self._marks:
            found = hashlib.sha256(f"{self.merging.plan.sha256} {self.turn.number} {rank}".encode())
            for name, array in sorted(self.state.to_arrays().items()):
                found.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
            self._marks[rank] = found.hexdigest()[:_MARK_SIGNS]
        return self._marks[rank]

    def read(self, rank: int, sent: Mapping[str, NDArray[Any]]) -> AdapterState:
        """Return the tensors of a valid reply; the errors of `validate` and of the codec."""
        layout, reference = self.merging.algorithm.up(self.merging.at(rank), self.turn), self.reference(rank)
        codec = self.merging.codec
        state = sent if codec is None else codec.decode(Payload(sent), reference, layout)
        validate(state, layout, max_norm=self.merging.plan.aggregation.max_update_norm, reference=reference)
        return state

    def reference(self, rank: int) -> AdapterState:
        """Return what an honest site of a rank starts from, for all that it sends: zero where it is sent none."""
        if rank not in self._references:
            layout = self.merging.at(rank)
            received = self.merging._received(layout, self.turn, self.state).adapter  # noqa: SLF001 - same module
            up = self.merging.algorithm.up(layout, self.turn)
            self._references[rank] = {
                spec.name: received.get(spec.name, np.zeros(spec.shape, np.float32)) for spec in up.tensors
            }
        return self._references[rank]


def whole(state: SiteState) -> AdapterState:
    """Return an adapter with its increments of the base as one state that a workspace can load."""
    return {**state.adapter, **{name: array for name, array in state.memory.items() if name.startswith(INCREMENT)}}


def _shaped(initial: AdapterState, layout: AdapterLayout) -> AdapterState:
    """Return a start of another rank: only its shapes and its head matter, since every such algorithm sends factors."""
    return {
        spec.name: initial[spec.name] if spec.role == "head" else np.zeros(spec.shape, np.float32)
        for spec in layout.tensors
    }
