"""Base weights that a study adds to: W = W0 + s·B·A for the layers that `flora` and `fedex` change.

A federation's sites are parts of one process in a simulation, and each may hold another number of rounds, so the
increments are a part of the adapter state that is loaded and never of the model. W is computed from a copy of W0 each
time, in float64, and rounded once: loading the same state gives the same bits whatever was loaded before, and a state
without increments brings W0 back bit for bit. The copies are made when the first increment comes.
"""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.model.layout import INCREMENT, AdapterState


@dataclass(frozen=True, slots=True)
class BaseLayer:
    """One adapted layer's frozen weight; `transposed` is `Conv1D`'s (d_in, d_out), `scale` is alpha / rank."""

    weight: nn.Parameter
    scale: float
    transposed: bool


class Increments:
    """The increments that are in a model's base weights now."""

    def __init__(self, layers: Mapping[str, BaseLayer]) -> None:
        self._layers = layers
        self._pristine: dict[str, Tensor] = {}
        self._loaded: AdapterState = {}

    def load(self, state: AdapterState) -> None:
        """Make the base W0 plus the increments `drift/…` of a state, and nothing of earlier ones.

        Errors: `model.unknown-tensor` for a layer that is not adapted, `model.rounded-base` for a base below float32.
        """
        wanted = {name: array for name, array in state.items() if name.startswith(INCREMENT)}
        if _same(wanted, self._loaded):
            return
        layers = {name.removeprefix(INCREMENT).rsplit(".lora_", 1)[0] for name in wanted}
        if unknown := sorted(layers - self._layers.keys()):
            raise ModelError("unknown-tensor", f"the adapted model has no layer {unknown[0]!r:.80}")
        self._loaded = {}
        for name, weight in self._pristine.items():
            self._layers[name].weight.data.copy_(weight)
        for name in sorted(layers):
            self._add(name, wanted)
        self._loaded = {name: np.array(array) for name, array in wanted.items()}

    def _add(self, name: str, wanted: AdapterState) -> None:
        layer = self._layers[name]
        if layer.weight.dtype not in {torch.float32, torch.float64}:
            raise ModelError(
                "rounded-base",
                f"the base weight of {name} is {layer.weight.dtype}, which would round increments off",
                hint="model.dtype=float32 with model.quantization=none",
            )
        weight = self._pristine.setdefault(name, layer.weight.detach().clone())
        A, B = (_wide(wanted[f"{INCREMENT}{name}.{role}.weight"]) for role in ("lora_A", "lora_B"))
        change = layer.scale * (B @ A)
        change = change.T if layer.transposed else change
        layer.weight.data.copy_(weight.double() + torch.from_numpy(np.ascontiguousarray(change)).to(weight.device))


def base_layers(layers: Mapping[str, Any]) -> Increments:
    """Return the increments, none, of PEFT's LoRA layers by canonical name."""
    return Increments(
        {
            name: BaseLayer(base.weight, layer.scaling["default"], type(base).__name__ == "Conv1D")
            for name, layer in layers.items()
            for base in (layer.get_base_layer(),)
        }
    )


def _same(one: AdapterState, other: AdapterState) -> bool:
    if one.keys() != other.keys():
        return False
    return all(np.array_equal(one[name], other[name]) for name in one)


def _wide(array: Any) -> Any:
    return np.asarray(array, np.float64)
