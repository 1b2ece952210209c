"""Per-record gradients of LoRA adapters and heads in one backward pass, at the cost of the plain one.

A LoRA factor is small, so its per-record gradients take the same multiplications as their sum would, as a batched
product into a flat store: 4·B·r·(d + o) more operations a layer, a share r(d + o)/(T·d·o) of the layer's. No hooks,
no second pass, and no activation is kept that autograd would not keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import PrivacyError
from fedtune.privacy.engines import BatchLosses, Parameters, PerSampleEngine, checked_losses
from fedtune.privacy.inspection import refuse_coupled
from fedtune.privacy.layer_rules import Rule, recording_forward, rule_of
from fedtune.privacy.lora_layers import ReplacedForwards, fuse, is_fusible
from fedtune.privacy.owners import owners, refuse_second
from fedtune.privacy.rows import GradientRows


class LoraEngine(PerSampleEngine):
    """Per-record gradients of `parameters`, all trainable parameters of `model`; `close` leaves the model as it was.

    `rules` says for each trained layer how its gradients are formed: `fused LoRA` and `linear` as matrix products,
    `functorch` for any other single layer, mapped over records. `rows` is the store that the layers fill. Raises
    PrivacyError where records are mixed (see `inspection`), a layer has no rule, a trainable parameter is not listed,
    or another engine is at work.
    """

    def __init__(self, model: nn.Module, parameters: Parameters) -> None:
        refuse_coupled(model)
        held = owners(model, parameters)
        refuse_second(model)
        self._parameters = tuple(parameters)
        self.rows = GradientRows([tensor for _, tensor in parameters])
        self._replaced = ReplacedForwards()
        self.rules: Mapping[str, Rule] = _rules(model, held)
        fuse(model, self._replaced, self.rows)
        for name, layer in held.items():
            self._replaced.replace(layer, recording_forward(name, layer, rule_of(name, layer), self.rows))

    def close(self) -> None:
        """Give every layer its own forward back."""
        self._replaced.undo()

    def per_sample_gradients(self, batch_losses: BatchLosses, records: int) -> Tensor:
        """Return (records, P) gradients in this engine's column order; `batch_losses` returns (records,) losses.

        The rows are valid until the next call and may be overwritten. No records: (0, P), and the forward pass does
        not run. A parameter that took no part has zero rows. Raises PrivacyError where the losses or a layer's
        inputs are not one for each record (the layer is named), and where a parameter was used outside its layer.
        """
        tensors = [tensor for _, tensor in self._parameters]
        with self.rows.recording(records):
            if records:
                with torch.enable_grad():
                    losses = checked_losses(batch_losses(), records)
                    self._backward(losses, tensors)
            return self.rows.finished()

    def arrange(self, total: Tensor) -> Tensor:
        """Bring a sum of rows (P,) into the parameters' order."""
        return self.rows.arrange(total)

    def _backward(self, losses: Tensor, tensors: list[Any]) -> None:
        if not losses.requires_grad:
            return
        aggregate = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
        for (name, _), gradient in zip(self._parameters, aggregate, strict=True):
            if gradient is not None:
                raise PrivacyError(
                    "no-per-record-gradient",
                    f"{name} has a gradient, but not one for each record: it is used outside its layer.",
                    hint="Let the layer run as a module, not by its weight.",
                )


def _rules(model: nn.Module, held: Mapping[str, nn.Module]) -> dict[str, Rule]:
    """Name the rule of each trained layer; the factors of a fused layer count as one."""
    rules: dict[str, Rule] = {}
    fusible = {name for name, layer in model.named_modules() if is_fusible(layer)}
    for name, layer in held.items():
        fused = [parent for parent in fusible if name.startswith((f"{parent}.lora_A.", f"{parent}.lora_B."))]
        if fused:
            rules[fused[0]] = "fused LoRA"
        else:
            rules[name] = rule_of(name, layer)
    return rules
