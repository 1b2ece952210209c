"""What a robust rule reads: one tensor of every site at a time, and each site's share. Knows no rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout, AdapterState

Matrix = NDArray[np.float64]
Factor = NDArray[np.floating[Any]]

_NUMBERS: Final = 2**22  # numbers worked on at once: 32 MiB of float64


class Updates(Protocol):
    """All that the sites sent, in one fixed order of the sites (that of their names)."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Each site's weight pᵢ; they sum to 1."""

    def tensors(self, name: str) -> list[Factor]:
        """Return one tensor of every site."""


@dataclass(frozen=True, slots=True)
class EqualUpdates:
    """The updates of sites that count alike, all in memory."""

    states: Sequence[AdapterState]

    @property
    def shares(self) -> tuple[float, ...]:
        """1 / n for each of n sites."""
        return (1 / len(self.states),) * len(self.states)

    def tensors(self, name: str) -> list[Factor]:
        """Return one tensor of every site."""
        return [state[name] for state in self.states]


def heads_of(layout: AdapterLayout) -> AdapterLayout:
    """Return the layout of everything that is no factor of a layer."""
    return AdapterLayout(tuple(spec for spec in layout.tensors if spec.role == "head"))


def blocks(layout: AdapterLayout, updates: Updates, name: str) -> Iterator[tuple[slice, Matrix]]:
    """Yield (columns, rows) of one tensor, rows (n, columns) float64, in blocks that together cover it.

    Errors: `wrong-state` where a site's tensor has another shape than the layout's, `not-finite`.
    """
    shape = next(spec.shape for spec in layout.tensors if spec.name == name)
    tensors = updates.tensors(name)
    if any(tensor.shape != shape for tensor in tensors):
        raise AggregationError("wrong-state", f"tensor {name} does not have shape {shape} at every site")
    flat = [tensor.reshape(-1) for tensor in tensors]
    width = max(1, _NUMBERS // max(1, len(flat)))
    for start in range(0, flat[0].size, width):
        columns = slice(start, start + width)
        yield columns, finite(np.array([row[columns] for row in flat], np.float64), name)


def finite(tensor: Factor, name: str) -> Matrix:
    """Return the tensor in float64; `not-finite` when a site sent a NaN or an infinity."""
    array = np.asarray(tensor, np.float64)
    if not np.isfinite(array).all():
        raise AggregationError("not-finite", f"tensor {name} holds a NaN or an infinity", hint="validate it first")
    return array
