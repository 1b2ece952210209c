"""A federation without models: sites that move their tensors at random, and dense float64 arithmetic to judge by.

The mean here is a plain `fsum` in the precision of what was sent, so that the algebra can be judged in float64 too,
which the wire and its streaming mean never carry.
"""

# ruff: noqa: N803, N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedtune.aggregation.lora import drift
from fedtune.aggregation.lora.factors import at_rank
from fedtune.aggregation.lora.fedsb import core_name
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.protocol import Algorithm, ServerState, SiteState, Turn
from fedtune.config.schema import AggregationSettings
from fedtune.model.layout import AdapterLayout, TensorSpec

State = dict[str, np.ndarray]
PLAIN = AggregationSettings()
FULL_RANK = 6


@dataclass(frozen=True)
class Site:
    """A site's weight and rank, how far its training moves, and the number format it computes in."""

    weight: float
    rank: int = 3
    moves: float = 1.0
    form: str = "float32"


@dataclass
class ListStack:
    """All replies in memory, in the order given."""

    shares: tuple[float, ...]
    replies: list[State]

    def tensors(self, name: str) -> list[np.ndarray]:
        return [reply[name] for reply in self.replies]


@dataclass
class World:
    """An algorithm, its coordinator's state, and each site's own state with the last round whose outcome it holds."""

    algorithm: Algorithm
    layout: AdapterLayout
    server: ServerState
    sites: list[Site]
    held: list[SiteState]
    since: list[int]
    bases: list[dict[str, np.ndarray]]
    settings: AggregationSettings = PLAIN
    number: int = 0
    trained: list[SiteState] = field(default_factory=list)

    def round(self, seed: int, present: list[int] | None = None) -> dict[str, np.ndarray]:
        """Run one round with some of the sites (all); return the mean update M of the states they trained to."""
        self.number += 1
        present = list(range(len(self.sites))) if present is None else present
        received = {at: self.fetch(at) for at in present}
        states = {at: self.train(at, received[at], seed + 1000 * at) for at in present}
        self.trained = [states[at] for at in present]
        for part in range(self.algorithm.traits.exchanges):
            self.exchange(part, states)
        for at in present:
            self.held[at] = self.algorithm.carried(self.layout_of(at), received[at], states[at])
        return mean_update(self.layout, self.trained, [self.sites[at].weight for at in present])

    def fetch(self, at: int) -> SiteState:
        """Bring one site up to date and return the state that it trains from."""
        turn, layout = Turn(self.number), self.layout_of(at)
        message = self.algorithm.server.send(layout, turn, self.server, self.since[at])
        state = self.algorithm.site.receive(layout, turn, self.held[at], message)
        for layer, delta in dense_drift(layout, state).items():
            self.bases[at][layer] = self.bases[at][layer] + delta
        self.since[at] = self.number - 1
        return state

    def train(self, at: int, state: SiteState, seed: int) -> SiteState:
        """Move every tensor that the algorithm lets a site train, and no other."""
        site, generator = self.sites[at], np.random.default_rng(seed)
        moved = dict(state.adapter)
        for name in self.algorithm.site.trained(self.layout_of(at), Turn(self.number)).names:
            step = generator.standard_normal(moved[name].shape)
            moved[name] = as_form(moved[name] + site.moves * step, site.form)
        return SiteState(moved, state.memory)

    def exchange(self, part: int, states: dict[int, SiteState]) -> None:
        """Let the sites send one part and the coordinator take it in; `states` are replaced by what they hold then."""
        turn, replies = Turn(self.number, part), []
        for at, state in states.items():
            layout = self.layout_of(at)
            if part:
                message = self.algorithm.server.send(layout, turn, self.server, self.since[at])
                states[at] = self.algorithm.site.receive(layout, turn, state, message)
            replies.append(dict(self.algorithm.site.send(layout, turn, states[at])))
        weights = [self.sites[at].weight for at in states]
        gathered = gather(self.algorithm, self.layout, turn, replies, weights)
        self.server = self.algorithm.server.receive(self.settings, self.layout, turn, self.server, gathered)

    def layout_of(self, at: int) -> AdapterLayout:
        rank = self.sites[at].rank
        return self.layout if self.algorithm.traits.ranks == "one" else at_rank(self.layout, rank)

    def update(self) -> dict[str, np.ndarray]:
        """Return W − W0 of each layer at the coordinator, dense."""
        factors = self.algorithm.server.update(self.layout, self.server)
        return {layer: dense(A, B) for layer, (A, B) in factors.items()}

    def base(self) -> dict[str, np.ndarray]:
        """Return what the coordinator knows to have been added to W0."""
        joined = drift.after(self.layout, self.server.memory, 0)
        return {layer: dense(A, B) for layer, (A, B) in joined.items()}


def start(algorithm: Algorithm, layout: AdapterLayout, sites: list[Site], **settings: Any) -> World:
    """Return a federation before its first round: A random, B zero, as the plan's seed would give them."""
    chosen = AggregationSettings(**settings)
    form = "float64" if any(site.form == "float64" for site in sites) else "float32"
    server = algorithm.server.start(chosen, layout, initial(layout, form))
    held = []
    for site in sites:
        own = layout if algorithm.traits.ranks == "one" else at_rank(layout, site.rank)
        held.append(algorithm.site.start(own, initial(own, form)))
    bases = [{B.layer: np.zeros((B.shape[0], A.shape[1])) for A, B in layout.pairs} for _ in sites]
    return World(algorithm, layout, server, sites, held, [0] * len(sites), bases, chosen)


def layout_of(layers: dict[str, tuple[int, int, int]], head: tuple[int, ...] | None = (3, 5)) -> AdapterLayout:
    """Return a layout from (rank, d_in, d_out) of each layer; `emb` layers are named as PEFT names embeddings."""
    specs = []
    for layer, (rank, d_in, d_out) in layers.items():
        kind, end = ("lora_embedding_", "") if layer.startswith("emb") else ("lora_", ".weight")
        specs.append(TensorSpec(f"{layer}.{kind}A{end}", (rank, d_in), "lora_A", layer))
        specs.append(TensorSpec(f"{layer}.{kind}B{end}", (d_out, rank), "lora_B", layer))
    if head is not None:
        specs.append(TensorSpec("score.weight", head, "head"))
    return AdapterLayout(tuple(sorted(specs, key=lambda spec: spec.name)))


def initial(layout: AdapterLayout, form: str = "float32") -> State:
    """Return the same start on every machine: A and head random, B zero."""
    state = {}
    for spec in layout.tensors:
        drawn = np.random.default_rng(len(spec.name)).standard_normal(spec.shape)
        state[spec.name] = np.zeros(spec.shape) if spec.role == "lora_B" else drawn
    return {name: as_form(array, form) for name, array in state.items()}


def as_form(array: np.ndarray, form: str) -> np.ndarray:
    """Return numbers of float64, of float32, or of bfloat16 (which NumPy holds as float32 with 16 zero bits)."""
    if form == "float64":
        return np.asarray(array, np.float64)
    narrow = np.asarray(array, np.float32)
    return (narrow.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if form == "bfloat16" else narrow


def gather(
    algorithm: Algorithm, layout: AdapterLayout, turn: Turn, replies: list[State], weights: list[float]
) -> Gathered:
    """Return the mean and the stack of the replies, in the precision in which they came."""
    total = math.fsum(weights)
    shares = tuple(weight / total for weight in weights)
    mean = {
        name: mean_of([reply[name] for reply in replies], shares) for name in algorithm.averaged(layout, turn).names
    }
    return Gathered(mean, ListStack(shares, replies))


def mean_of(arrays: list[np.ndarray], shares: tuple[float, ...]) -> np.ndarray:
    total = sum(share * array.astype(np.float64) for share, array in zip(shares, arrays, strict=True))
    return np.asarray(total, arrays[0].dtype)


def dense(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Return B·A entry by entry in float64: no matrix product of the code under test."""
    return np.einsum("or,ri->oi", B.astype(np.float64), A.astype(np.float64))


def site_products(layout: AdapterLayout, adapter: State) -> dict[str, np.ndarray]:
    """Return a site's own update of each layer: B·A, or B·R·A where there is a core."""
    found = {}
    for spec_A, spec_B in layout.pairs:
        A, B, R = adapter[spec_A.name], adapter[spec_B.name], adapter.get(core_name(spec_A.layer))
        found[spec_A.layer] = dense(A, B) if R is None else dense(A, dense(R, B))
    return found


def mean_update(layout: AdapterLayout, states: list[SiteState], weights: list[float]) -> dict[str, np.ndarray]:
    """Return M = Σ pᵢ·Bᵢ·Aᵢ of each layer, dense, in float64."""
    total = math.fsum(weights)
    products = [site_products(layout, dict(state.adapter)) for state in states]
    return {
        layer: sum(weight / total * product[layer] for weight, product in zip(weights, products, strict=True))
        for layer in products[0]
    }


def dense_drift(layout: AdapterLayout, state: SiteState) -> dict[str, np.ndarray]:
    """Return the increments of the base that a site has just received, dense."""
    found = {}
    for spec_A, spec_B in layout.pairs:
        if drift.PREFIX + spec_A.name in state.memory:
            found[spec_A.layer] = dense(
                state.memory[drift.PREFIX + spec_A.name], state.memory[drift.PREFIX + spec_B.name]
            )
    return found


def distance(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Return the largest relative Frobenius distance of any layer; for a layer that should be zero, the absolute."""
    assert found.keys() == wanted.keys()
    gaps = {layer: float(np.linalg.norm(found[layer] - wanted[layer])) for layer in wanted}
    return max(gap / (float(np.linalg.norm(wanted[layer])) or 1.0) for layer, gap in gaps.items())
