"""Per-record gradients of trained layers that are not fused LoRA: linear layers, and any single layer by functorch.

Knows no model as a whole. A layer that has no rule is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedtune.errors import PrivacyError
from fedtune.privacy.lora_functions import Recorded, linear
from fedtune.privacy.lora_layers import Forward, is_watched
from fedtune.privacy.rows import GradientRows

Rule = Literal["fused LoRA", "linear", "functorch"]


def rule_of(name: str, layer: nn.Module) -> Rule:
    """Return the rule for a layer that holds trainable parameters of its own, or refuse the layer."""
    own = {key for key, _ in layer.named_parameters(recurse=False)}
    if type(layer) is nn.Linear and own <= {"weight", "bias"}:  # weight_norm keeps others on it
        return "linear"
    is_single = not list(layer.children()) and type(layer).forward is not nn.Module.forward
    if is_single and not list(layer.buffers(recurse=False)) and not is_watched(layer):
        return "functorch"
    raise _unsupported(name, layer, "has no per-record gradient rule")


def _unsupported(name: str, layer: nn.Module, reason: str) -> PrivacyError:
    return PrivacyError(
        "unsupported-layer",
        f"the layer {name} ({type(layer).__name__}) {reason}.",
        hint="Freeze it, or choose other lora.targets.",
    )


def recording_forward(name: str, layer: Any, rule: Rule, rows: GradientRows) -> Forward:
    """Return a forward that records per-record gradients while `rows` does, and is the layer's own otherwise."""
    own_forward = layer.forward
    recorded_forward = _linear(layer, rows) if rule == "linear" else _by_functorch(name, layer, rows)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if not rows.records or not torch.is_grad_enabled():
            result: Tensor = own_forward(*args, **kwargs)
            return result
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise _unsupported(name, layer, "is given more than the records' tensor")
        rows.check(name, inputs[0])
        return recorded_forward(inputs[0])

    return forward


def _linear(layer: nn.Linear, rows: GradientRows) -> Forward:
    def forward(x: Tensor) -> Tensor:
        weight, bias = layer.weight, layer.bias
        wanted = Recorded.of(rows, weight, bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            cast_bias = None if bias is None else bias.to(dtype)
            return linear(x.to(dtype), weight.to(dtype), cast_bias, wanted)
        return linear(x, weight, bias, wanted)

    return forward


def _by_functorch(name: str, layer: nn.Module, rows: GradientRows) -> Forward:
    """Map the layer over single records, so that each output and gradient is that record's alone by construction."""
    twin = copy.copy(layer)  # the replaced forward is not its own; the tensors are the layer's
    vars(twin)["_parameters"] = dict(layer.named_parameters(recurse=False))
    names = tuple(key for key, tensor in layer.named_parameters(recurse=False) if tensor.requires_grad)
    trained = [layer.get_parameter(key) for key in names]
    mapped = _Twin(name, twin, names)

    def forward(x: Tensor) -> Tensor:
        twin.training = layer.training
        result: Tensor = _Mapped.apply(x, mapped, rows, *trained)
        return result

    return forward


class _Twin:
    """A layer as a function of its trained parameters and one record."""

    def __init__(self, name: str, layer: nn.Module, names: tuple[str, ...]) -> None:
        self.name, self.layer, self.names = name, layer, names

    def __call__(self, parameters: Mapping[str, Tensor], record: Tensor) -> Tensor:
        output: Any = torch.func.functional_call(self.layer, dict(parameters), (record[None],))
        if not isinstance(output, Tensor) or len(output) != 1:
            raise TypeError("it does not return one tensor with a row for each record")
        return output[0]

    def outputs(self, parameters: Mapping[str, Tensor], records: Tensor) -> Tensor:
        """Return the layer's output, computed record by record."""
        try:
            output: Tensor = torch.func.vmap(self, in_dims=(None, 0))(parameters, records)
        except Exception as error:  # a layer can fail under vmap in many ways
            reason = f"{str(error).strip().splitlines()[0].rstrip('.'):.200}"
            raise _unsupported(self.name, self.layer, f"cannot be run record by record: {reason}") from error
        return output.clone()  # no view: the caller may change it in place

    def gradients(self, parameters: Mapping[str, Tensor], records: Tensor, g: Tensor) -> tuple[Any, Tensor | None]:
        """Return per-record gradients by name, and the gradient of the input (None for token ids)."""
        if not records.is_floating_point():

            def of_parameters(record: Tensor, gradient: Tensor) -> Any:
                return torch.func.vjp(lambda held: self(held, record), parameters)[1](gradient)[0]

            return torch.func.vmap(of_parameters)(records, g), None

        def of_both(record: Tensor, gradient: Tensor) -> Any:
            return torch.func.vjp(self, parameters, record)[1](gradient)

        found: tuple[Any, Tensor] = torch.func.vmap(of_both)(records, g)
        return found


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, twin: _Twin, rows: GradientRows, *parameters: Tensor) -> Tensor:
        ctx.twin, ctx.rows, ctx.parameters = twin, rows, parameters
        ctx.save_for_backward(x)
        return twin.outputs(dict(zip(twin.names, parameters, strict=True)), x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,), twin = ctx.saved_tensors, ctx.twin
        held = dict(zip(twin.names, ctx.parameters, strict=True))
        by_name, grad_x = twin.gradients(held, x, gradients[0])
        for name, parameter in held.items():
            ctx.rows.add(parameter, by_name[name])
        return (grad_x, None, None, *(None for _ in held))
