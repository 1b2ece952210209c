"""Server optimisers: how far the global adapter follows the sites' mean.

They act on the pseudo-gradient Δ = mean − global, entry by entry, with global ← global + η·step:

| name | step | state |
|---|---|---|
| `fedavg` | Δ | none |
| `fedavgm` | m ← momentum·m + Δ; m | m₀ = 0 |
| `fedadagrad` | m, v ← v + Δ²; m / (√v + τ) | m₀ = 0, v₀ = τ² |
| `fedyogi` | m, v ← v − (1 − β₂)·Δ²·sign(v − Δ²); m / (√v + τ) | the same |
| `fedadam` | m, v ← β₂·v + (1 − β₂)·Δ²; m / (√v + τ) | the same |

with m ← β₁·m + (1 − β₁)·Δ in the last three. Sources: FedAvgM, Hsu et al. (arXiv 1909.06335); the adaptive three,
algorithm 2 of Reddi et al. (arXiv 2003.00295). As there, v starts at τ² and nothing is bias-corrected; Flower's FedAdam
differs in both.

Pure functions over serialisable state. Knows no factor and no algorithm: a tensor is a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedtune.config.schema import AggregationSettings
    from fedtune.model.layout import AdapterState, Array

Moment = NDArray[np.float64]

ADAPTIVE: Final = frozenset({"fedadam", "fedyogi", "fedadagrad"})
MOMENTUM: Final = "momentum/"
VARIANCE: Final = "variance/"


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What a server optimiser remembers: rounds applied, and float64 moments named `momentum/NAME`, `variance/NAME`."""

    step: int
    moments: Mapping[str, Moment]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state as named arrays for a checkpoint; `step` is an int64 array of shape (1,)."""
        return {"step": np.array([self.step], np.int64), **self.moments}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> OptimizerState:
        """Read back what `to_arrays` wrote, bit for bit."""
        if "step" not in arrays:
            raise AggregationError("broken-state", "a server optimiser's state has no step counter")
        moments = {name: np.asarray(array, np.float64) for name, array in arrays.items() if name != "step"}
        return cls(int(arrays["step"].item()), moments)


def init(settings: AggregationSettings, state: AdapterState) -> OptimizerState:
    """Return the optimiser's state before the first round, for the tensors in `state` (their values are not used)."""
    moments: dict[str, Moment] = {}
    for name, array in state.items():
        if settings.server_optimizer != "fedavg":
            moments[MOMENTUM + name] = np.zeros(array.shape)
        if settings.server_optimizer in ADAPTIVE:
            moments[VARIANCE + name] = np.full(array.shape, settings.tau**2)
    return OptimizerState(0, moments)


def apply(
    settings: AggregationSettings, global_state: AdapterState, mean_state: AdapterState, opt_state: OptimizerState
) -> tuple[dict[str, Array], OptimizerState]:
    """Return the next global tensors and the optimiser's next state; float64 inside, nothing changed in place.

    Covers the tensors of `mean_state`; `global_state` may hold more (a frozen A). `fedavg` with a server learning rate
    of 1 returns the mean bit for bit. Error: `not-finite` when the step leaves float32's range.
    """
    new_state: dict[str, Array] = {}
    moments: dict[str, Moment] = {}
    for name, mean in mean_state.items():
        if settings.server_optimizer == "fedavg" and settings.server_learning_rate == 1:
            new_state[name] = mean  # global + (mean − global) would round
            continue
        before = global_state[name].astype(np.float64)
        step = _step(settings, name, mean - before, opt_state.moments, moments)
        new_state[name] = _narrow(name, before + settings.server_learning_rate * step)
    return new_state, OptimizerState(opt_state.step + 1, moments)


def _step(
    settings: AggregationSettings, name: str, delta: Moment, old: Mapping[str, Moment], new: dict[str, Moment]
) -> Moment:
    """Return the step for one tensor and write its next moments into `new`."""
    if settings.server_optimizer == "fedavg":
        return delta
    if settings.server_optimizer == "fedavgm":
        momentum = settings.momentum * old[MOMENTUM + name] + delta
        new[MOMENTUM + name] = momentum
        return momentum
    momentum = settings.beta1 * old[MOMENTUM + name] + (1 - settings.beta1) * delta
    variance = _variance(settings, old[VARIANCE + name], delta**2)
    new[MOMENTUM + name], new[VARIANCE + name] = momentum, variance
    return momentum / (np.sqrt(variance) + settings.tau)


def _variance(settings: AggregationSettings, variance: Moment, square: Moment) -> Moment:
    """Return the next second moment of the adaptive optimisers."""
    if settings.server_optimizer == "fedadagrad":
        return variance + square
    if settings.server_optimizer == "fedyogi":
        return variance - (1 - settings.beta2) * square * np.sign(variance - square)
    return settings.beta2 * variance + (1 - settings.beta2) * square


def _narrow(name: str, wide: Moment) -> Array:
    """Round to float32; a step out of its range is an error, not an infinity."""
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise AggregationError(
            "not-finite",
            f"the server optimiser's step on {name} leaves float32's range",
            hint="lower aggregation.server_learning_rate",
        )
    return narrow
