"""The mean of the last K global adapters: post-processing of what was released already, so it costs no privacy.

Averaging factors is not averaging updates, here as among sites. The mean that is meant is M = (1/K)·Σ Bₖ·Aₖ, and:

- the same A in all K (`ffa`): A and the mean of the Bₖ, exactly;
- `fedsvd`: each re-factoring stays in the row space of the first A, so M has rank ≤ r and one re-factoring of the
  stacked factors is M up to float32 rounding;
- `fedit`: M has rank up to K·r, and the result is the best rank-r approximation of it in the Frobenius norm. What is
  cut is small where the last adapters differ little, which is where one averages.

Keeps K adapters in memory. Knows no algorithm: it looks at whether the A differ.
"""

# ruff: noqa: N803, N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from fedtune.aggregation.algebra import best_rank
from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fedtune.model.layout import AdapterLayout, AdapterState, Array, TensorSpec


class TailAverage:
    """A window over the last `last` global adapters and the mean of the updates in it."""

    __slots__ = ("_layout", "_window")

    def __init__(self, layout: AdapterLayout, last: int) -> None:
        self._layout = layout
        self._window: deque[dict[str, Array]] = deque(maxlen=last)

    def push(self, state: AdapterState) -> None:
        """Add the newest global adapter, all tensors of the layout; the oldest leaves a full window.

        The arrays are kept, not copied: an adapter that was published is not written to.
        """
        self._window.append({name: state[name] for name in self._layout.names})

    def result(self) -> dict[str, Array]:
        """Return the average as an adapter of the layout; with one adapter in the window, that one bit for bit.

        Error: `no-adapter` before the first `push`.
        """
        if not self._window:
            raise AggregationError("no-adapter", "no round has ended, so there is no adapter to average")
        states = list(self._window)
        if len(states) == 1:
            return dict(states[0])
        average = {spec.name: _mean(states, spec) for spec in self._layout.tensors}
        for spec_A, spec_B in self._layout.pairs:
            if not _frozen(states, spec_A):
                average[spec_A.name], average[spec_B.name] = _mean_update(states, spec_A, spec_B)
        return average

    def state(self) -> dict[str, Array]:
        """Return the window as named arrays for a checkpoint, `AGE/NAME` with age 0 for the oldest."""
        return {f"{age}/{name}": array for age, state in enumerate(self._window) for name, array in state.items()}

    def load(self, arrays: Mapping[str, Array]) -> None:
        """Replace the window by what `state` returned; `broken-state` when a tensor is missing."""
        ages = len(arrays) // len(self._layout.names)
        try:
            states = [{name: arrays[f"{age}/{name}"] for name in self._layout.names} for age in range(ages)]
        except KeyError as error:
            raise AggregationError("broken-state", f"the averaging window lacks tensor {error.args[0]}") from None
        if len(arrays) != ages * len(self._layout.names):
            raise AggregationError("broken-state", "the averaging window does not hold whole adapters")
        self._window.clear()
        self._window.extend(states)


def _mean(states: Sequence[AdapterState], spec: TensorSpec) -> Array:
    stacked = np.stack([state[spec.name] for state in states])
    return np.asarray(stacked.mean(axis=0, dtype=np.float64), np.float32)


def _frozen(states: Sequence[AdapterState], spec: TensorSpec) -> bool:
    return all(np.array_equal(states[0][spec.name], state[spec.name]) for state in states[1:])


def _mean_update(states: Sequence[AdapterState], spec_A: TensorSpec, spec_B: TensorSpec) -> tuple[Array, Array]:
    """Return the float32 factors of the layer's mean update, best rank-r approximation where it has a higher rank."""
    As, Bs = [state[spec_A.name] for state in states], [state[spec_B.name] for state in states]
    A, B = best_rank(As, Bs, [1 / len(states)] * len(states), spec_A.shape[0])
    return A.astype(np.float32), B.astype(np.float32)
