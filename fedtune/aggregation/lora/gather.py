"""What one exchange brings together: the mean of what can be averaged, and the stack of what cannot.

Knows no algorithm: two layouts say which tensor goes where, and a tensor may go to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from fedtune.aggregation.lora.factors import Array, State, select
from fedtune.aggregation.lora.stack import MOST_BYTES, SpillingStack
from fedtune.aggregation.mean import StreamingMean
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout


class Stack(Protocol):
    """All that sites sent, tensor by tensor, in one fixed order of the sites."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Each site's weight pᵢ; they sum to 1."""

    def tensors(self, name: str) -> list[Array]:
        """Return one tensor of every site."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the coordinator's half receives: `mean` by name, the stack, and the sum of the weights of all who came."""

    mean: State
    stack: Stack
    weight: float = 1.0


class Collector:
    """Takes replies one by one in any order; the result does not depend on the order, bit for bit.

    Memory: one or two int64 adapters for the mean, whatever the number of sites, and for what is stacked `most_bytes`,
    then disk. Of a reply that is averaged nothing is kept but the site's name.
    """

    __slots__ = ("_averaged", "_mean", "_sites", "_stack", "_stacked", "_weight")

    def __init__(
        self,
        averaged: AdapterLayout,
        stacked: AdapterLayout,
        *,
        most_bytes: int = MOST_BYTES,
        folder: Path | None = None,
    ) -> None:
        self._averaged, self._stacked = averaged, stacked
        self._mean = StreamingMean(averaged)
        self._stack = SpillingStack(most_bytes=most_bytes, folder=folder)
        self._sites: set[str] = set()
        self._weight = Fraction(0)  # exact, so that the order of the replies does not matter

    @property
    def count(self) -> int:
        """How many replies were added."""
        return len(self._sites)

    def add(self, site: str, state: State, weight: float) -> None:
        """Add a valid reply, float32, with a positive finite weight; one that is refused changes nothing.

        Errors: `duplicate-site`, and those of the mean, the stack and the disk.
        """
        if site in self._sites:
            raise AggregationError("duplicate-site", f"site {site} has sent its update of this exchange already")
        if self._stacked.tensors:
            self._stack.add(site, select(state, self._stacked), weight)
        if self._averaged.tensors:
            self._add_to_mean(site, state, weight)
        self._sites.add(site)
        self._weight += Fraction(weight)

    def result(self) -> Gathered:
        """Return the mean and the stack; `no-site` when nothing was added."""
        if not self._sites:
            raise AggregationError("no-site", "there is no site's update to average", hint="see why sites failed")
        return Gathered(self._mean.result() if self._averaged.tensors else {}, self._stack, float(self._weight))

    def close(self) -> None:
        """Give the stack's memory and file back."""
        self._stack.close()

    def _add_to_mean(self, site: str, state: State, weight: float) -> None:
        """Add to the mean; if it refuses, the stack forgets the reply, so that both hold the same sites."""
        try:
            self._mean.add({name: np.asarray(state[name], np.float32) for name in self._averaged.names}, weight)
        except AggregationError:
            if self._stacked.tensors:
                self._stack.discard(site)
            raise
