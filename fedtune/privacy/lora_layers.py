"""PEFT's LoRA layers run as one autograd node: for private and plain training, and for evaluation.

The only place that knows PEFT's LoRA layer from inside (each attribute has a contract test). A layer that is anything
but plain LoRA on a frozen linear layer keeps PEFT's own forward, which stays the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.privacy.lora_functions import LoraTerms, Recorded, lora_linear
from fedtune.privacy.rows import GradientRows

Forward = Callable[..., Tensor]


class ReplacedForwards:
    """Forwards put in the place of layers' own, until `undo`; the layers stay the same objects of the same class."""

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []

    def replace(self, layer: nn.Module, forward: Forward) -> None:
        """Let calls of a layer run `forward`."""
        vars(layer)["forward"] = forward
        self._layers.append(layer)

    def undo(self) -> None:
        """Give every layer its own forward back."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
        self._layers.clear()


@contextmanager
def fused(model: nn.Module) -> Iterator[int]:
    """Run the model's LoRA layers as one node each inside the block; yields how many there are.

    For training without privacy and for evaluation. Results differ from PEFT's by rounding only. A layer that already
    runs as one node, in another such block or a per-record engine, stays as it is.
    """
    replaced = ReplacedForwards()
    try:
        yield fuse(model, replaced, None)
    finally:
        replaced.undo()


def fuse(model: nn.Module, replaced: ReplacedForwards, rows: GradientRows | None) -> int:
    """Replace the forwards of all plain LoRA layers; with `rows`, per-record gradients go there while it records."""
    layers = [(name, layer) for name, layer in model.named_modules() if is_fusible(layer)]
    for name, layer in layers:
        replaced.replace(layer, _fused_forward(name, layer, rows))
    return len(layers)


def is_fusible(layer: Any) -> bool:
    """Say whether a layer is plain LoRA on a frozen nn.Linear or Conv1D, with nothing attached to it."""
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    plain = type(layer) is Linear and len(layer.active_adapters) == 1 and "forward" not in vars(layer)
    return plain and _is_frozen_with_factors(layer, layer.active_adapters[0], {nn.Linear, Conv1D})


def _is_frozen_with_factors(layer: Any, adapter: str, bases: set[type[nn.Module]]) -> bool:
    if adapter not in layer.lora_A or adapter in layer.lora_variant:
        return False
    base, *factors = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    return (
        type(base) in bases
        and all(type(factor) is nn.Linear and factor.bias is None for factor in factors)
        and not any(tensor.requires_grad for tensor in base.parameters(recurse=False))
        and not any(is_watched(part) for part in (base, *factors))
    )


def is_watched(layer: nn.Module) -> bool:
    """Say whether somebody else's code runs with a layer; it would be passed over."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(layer) or any(vars(layer)[name] for name in hooks)


def _fused_forward(name: str, layer: Any, rows: GradientRows | None) -> Forward:
    own_forward, adapter = layer.forward, layer.active_adapters[0]
    dropout, terms = layer.lora_dropout[adapter], _terms(layer, adapter)
    recorded = None if rows is None else Recorded.of(rows, terms.factor_a, terms.factor_b)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        unusual = args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [adapter]
        if unusual or layer.scaling[adapter] != terms.scaling:
            result: Tensor = own_forward(x, *args, **kwargs)
            return result
        x, used = _in_one_type(x, terms)
        dropped = None if type(dropout) is nn.Identity else dropout(x)
        return lora_linear(x, None if dropped is x else dropped, used, _checked(name, x, recorded))

    return forward


def _terms(layer: Any, adapter: str) -> LoraTerms:
    base, a, b = layer.base_layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LoraTerms(base.weight, base.bias, a, b, layer.scaling[adapter], transposed=type(base) is not nn.Linear)


def _checked(name: str, x: Tensor, recorded: Recorded | None) -> Recorded | None:
    """Return where gradients go while they are recorded, None otherwise."""
    if recorded is None or not recorded.rows.records or not torch.is_grad_enabled():
        return None
    recorded.rows.check(name, x)
    return recorded


def _in_one_type(x: Tensor, terms: LoraTerms) -> tuple[Tensor, LoraTerms]:
    """Bring all operands into the type of the product: autocast's, or else the input's."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if dtype == terms.factor_a.dtype == terms.factor_b.dtype == terms.weight.dtype == x.dtype:
        return x, terms
    bias = None if terms.bias is None else terms.bias.to(dtype)
    a, b = terms.factor_a.to(dtype), terms.factor_b.to(dtype)
    return x.to(dtype), LoraTerms(terms.weight.to(dtype), bias, a, b, terms.scaling, terms.transposed)
