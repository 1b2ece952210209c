"""What an aggregation algorithm is: two halves of pure functions over serialisable state, and what it promises.

One exchange of one round, for a site that trained on layout `layout` (its own rank):

```
server.send → message → site.receive → (training of site.trained) → site.send → message → Collector → server.receive
```

Both halves have `start`, `send` and `receive`. A state is a flat mapping of names to arrays, so that a checkpoint, a
vault and a message hold the same thing. Adapter tensors have their canonical names; what an algorithm needs besides is
in `memory`, under a prefix of its own.

Knows no site, no Flower message, no model and no privacy budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from numpy.typing import NDArray

from fedtune.aggregation.lora.factors import Factors, State
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.server_optimizers import OptimizerState
from fedtune.config.schema import AggregationSettings
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout

Guarantee = Literal["exact", "almost surely", "up to rank", "inexact", "personal"]

ANY_OPTIMIZER: Final = frozenset({"fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"})
LINEAR_OPTIMIZER: Final = frozenset({"fedavg", "fedavgm"})
NO_OPTIMIZER: Final = frozenset({"fedavg"})
_GROUPS: Final = ("adapter", "optimizer", "memory")


@dataclass(frozen=True, slots=True)
class Turn:
    """Which exchange of which round: rounds count from 1, the exchanges of a round from 0."""

    number: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """What an algorithm needs of the plan besides the layout.

    `seed` is the study's, from which every machine draws the same frozen factors and sketches. `oversampling` is how
    many columns a sketch of `fedask` has beyond the rank. `train_both` lets its sites train A too.
    """

    seed: int = 0
    oversampling: int = 8
    train_both: bool = False


@dataclass(frozen=True, slots=True)
class Exactness:
    """How the new global update relates to M = Σ pᵢ·Bᵢ·Aᵢ: the kind, and the formula or condition behind it."""

    kind: Guarantee
    statement: str


@dataclass(frozen=True, slots=True)
class Traits:
    """What an algorithm is, for whoever decides what it can be combined with.

    - `linear`: everything that is sent enters a weighted mean alone. The coordinator then holds O(1) adapters, and
      secure aggregation works. Otherwise it holds all K that came (`Collector` spills them to disk over a bound).
    - `ranks`: whether sites may have ranks of their own.
    - `noisy`: the trained matrices, which carry the noise under DP. Two of them multiply: the error in W has a term
      ξ_B·ξ_A, quadratic in the noise. One gives B·ξ_A or ξ_B·A, linear.
    - `changes_base`: sites add to W0, which a 4- or 8-bit base cannot absorb without rounding.
    - `releases`: there is a global adapter.
    - `incremental`: a message holds what has changed since the last one, so a site must have kept what it was sent.
    - `trained_as`: whether the coordinates of what is trained mean the same from round to round; `turned` where the
      coordinator rewrites the factors, `alternating` where rounds train different ones. Moments, residuals and variates
      that a site keeps are vectors in these coordinates.
    - `exchanges`: how many times a round goes to and fro. All of them need the same sites.
    - `optimizers`: the server optimisers whose state keeps its meaning from round to round.
    """

    source: str
    exactness: Exactness
    linear: bool
    noisy: frozenset[Literal["A", "B", "R"]]
    ranks: Literal["one", "any"] = "one"
    changes_base: bool = False
    incremental: bool = False
    trained_as: Literal["same", "turned", "alternating"] = "same"
    releases: bool = True
    exchanges: int = 1
    optimizers: frozenset[str] = ANY_OPTIMIZER

    @property
    def noise_multiplies(self) -> bool:
        """Whether noise on both factors meets itself in the product."""
        return len(self.noisy) > 1

    def adapters_held(self, sites: int) -> int:
        """Return how many adapters a round of so many sites leaves at the coordinator until it ends."""
        return 1 if self.linear else sites


@dataclass(frozen=True, slots=True)
class SiteState:
    """What a site holds: its adapter, all tensors of its layout, and what the algorithm left in `memory`."""

    adapter: State
    memory: State = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServerState:
    """What the coordinator holds between exchanges: the global adapter, the optimiser's state, and `memory`."""

    adapter: State
    optimizer: OptimizerState
    memory: State = field(default_factory=dict)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state as named arrays for a checkpoint: `adapter/NAME`, `optimizer/NAME`, `memory/NAME`."""
        groups = (self.adapter, self.optimizer.to_arrays(), self.memory)
        return {
            f"{prefix}/{name}": array
            for prefix, group in zip(_GROUPS, groups, strict=True)
            for name, array in group.items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ServerState:
        """Read back what `to_arrays` wrote, bit for bit; `broken-state` for a name of no group."""
        groups: dict[str, dict[str, NDArray[Any]]] = {prefix: {} for prefix in _GROUPS}
        for key, array in arrays.items():
            prefix, _, name = key.partition("/")
            if prefix not in groups:
                raise AggregationError("broken-state", f"the coordinator's state has an unknown part {prefix!r:.40}")
            groups[prefix][name] = array
        return cls(groups["adapter"], OptimizerState.from_arrays(groups["optimizer"]), groups["memory"])


Layouts = Callable[[AdapterLayout, Turn], AdapterLayout]


@dataclass(frozen=True, slots=True)
class SiteHalf:
    """What a site does; `layout` is at the site's own rank.

    The state of a round is the one that `receive` returned, with the trained tensors written over it. What outlives
    the round is `Algorithm.carried`: the state as it was received, so that a round that is repeated, or that the
    coordinator never counted, leaves nothing behind.

    - `start(layout, initial)`: the state before the first round, from what the plan's seed gives every machine.
    - `trained(layout, turn)`: what the optimiser may change. Every other tensor must leave the round as it came, and
      an exchange that trains nothing has an empty layout.
    - `receive(layout, turn, state, message)`: the state that training starts from.
    - `send(layout, turn, state)`: the message, once the trained tensors are in `state.adapter`.
    - `kept(layout)`: what lives at the site alone and must survive until its next round.
    """

    start: Callable[[AdapterLayout, State], SiteState]
    trained: Layouts
    receive: Callable[[AdapterLayout, Turn, SiteState, State], SiteState]
    send: Callable[[AdapterLayout, Turn, SiteState], State]
    kept: Callable[[AdapterLayout], AdapterLayout]


@dataclass(frozen=True, slots=True)
class ServerHalf:
    """What the coordinator does; `layout` is at the plan's rank, except in `send`, where it is the site's.

    - `start(settings, layout, initial)`: the state before the first round.
    - `send(layout, turn, state, since)`: the message to a site that holds the outcome of all rounds up to `since`. A
      message of round n brings it to n − 1, so a site that never missed one is asked with n − 2; 0 is a site that has
      nothing but the plan, and always right for one that keeps nothing.
    - `receive(settings, layout, turn, state, gathered)`: the next state.
    - `update(layout, state)`: factors (A, B) of all that was learnt, W − W0 = s·B·A, for each layer, of any rank.
    """

    start: Callable[[AggregationSettings, AdapterLayout, State], ServerState]
    send: Callable[[AdapterLayout, Turn, ServerState, int], State]
    receive: Callable[[AggregationSettings, AdapterLayout, Turn, ServerState, Gathered], ServerState]
    update: Callable[[AdapterLayout, ServerState], dict[str, Factors]]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One aggregation rule.

    `averaged` and `stacked` are what a site sends, by what becomes of it: a weighted mean, or a list of all (a tensor
    may be in both). `down` is what the coordinator sends, except the increments of the base, whose rank follows from
    the cohort and which `fedtune.aggregation.lora.drift` checks.
    """

    name: str
    traits: Traits
    site: SiteHalf
    server: ServerHalf
    averaged: Layouts
    stacked: Layouts
    down: Callable[[AdapterLayout, Turn, int], AdapterLayout]

    def carried(self, layout: AdapterLayout, received: SiteState, trained: SiteState) -> SiteState:
        """Return what a site goes on with: the state it received, and of what it trained only what it keeps."""
        own = {name: trained.adapter[name] for name in self.site.kept(layout).names}
        return SiteState({**received.adapter, **own}, received.memory)

    def up(self, layout: AdapterLayout, turn: Turn) -> AdapterLayout:
        """Return exactly what a site of this layout sends in this exchange."""
        parts = self.averaged(layout, turn).tensors + self.stacked(layout, turn).tensors
        return AdapterLayout(tuple(sorted(set(parts), key=lambda spec: spec.name)))
