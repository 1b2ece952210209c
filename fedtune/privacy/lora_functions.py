"""The mathematics of a LoRA layer and of a trained linear layer, each as one autograd node.

Forward, with x (…, d), frozen W (o, d) and bias b (o), A (r, d), B (o, r) and scaling s:

    y = x Wᵀ + b + s·h Bᵀ,    h = x̃ Aᵀ    (x̃ is x after LoRA's dropout)

Backward, with g (…, o) the gradient of y and u = s·g B (…, r):

    ∂x = g W + u A (through the dropout),   ∂A_b = Σ_t u_btᵀ x̃_bt,   ∂B_b = s·Σ_t g_btᵀ h_bt

for each record b. Without a store of rows the sums run over the records too and are handed to autograd. W may be
frozen only: its gradient is never formed. Knows no module, no PEFT and no clipping.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtune.privacy.rows import GradientRows


@dataclass(frozen=True, slots=True)
class LoraTerms:
    """What a LoRA layer computes with besides its input, in the type that the matrix products run in.

    `weight` is (o, d), or (d, o) if `transposed` (GPT-2's Conv1D); `factor_a` (r, d), `factor_b` (o, r).
    """

    weight: Tensor
    bias: Tensor | None
    factor_a: Tensor
    factor_b: Tensor
    scaling: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class Recorded:
    """Where the per-record gradients go, and which parameters want one; None for a frozen tensor."""

    rows: GradientRows
    first: Tensor | None
    second: Tensor | None

    @classmethod
    def of(cls, rows: GradientRows, first: Tensor, second: Tensor | None) -> Recorded:
        """Return it for two parameters of a layer, each of which may be frozen, and the second missing."""
        wanted = (tensor if tensor is not None and tensor.requires_grad else None for tensor in (first, second))
        return cls(rows, *wanted)


def lora_linear(x: Tensor, dropped: Tensor | None, terms: LoraTerms, recorded: Recorded | None) -> Tensor:
    """Return y (…, o); `dropped` is x̃ where dropout is active."""
    if not torch.is_grad_enabled():
        return _lora_output(x, dropped, terms)[0]
    result: Tensor = _LoraLinear.apply(x, dropped, terms.factor_a, terms.factor_b, (terms, recorded))
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, recorded: Recorded) -> Tensor:
    """Return x Wᵀ + b of a trained layer whose per-record gradients are recorded."""
    result: Tensor = _RecordedLinear.apply(x, weight, bias, recorded)
    return result


def _lora_output(x: Tensor, dropped: Tensor | None, terms: LoraTerms) -> tuple[Tensor, Tensor]:
    """Return y and h (N, r), N = all positions of all records."""
    output = _affine(x, terms.weight if terms.transposed else terms.weight.t(), terms.bias)
    hidden = (x if dropped is None else dropped).reshape(-1, x.shape[-1]).mm(terms.factor_a.t())
    output.view(len(hidden), -1).addmm_(hidden, terms.factor_b.t(), alpha=terms.scaling)
    return output, hidden


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W + b for W (d, o), not as a view: some models scale a query in place."""
    output = x.new_empty(*x.shape[:-1], weight.shape[1])
    flat, product = x.reshape(-1, x.shape[-1]), output.view(-1, weight.shape[1])
    if bias is None:
        torch.mm(flat, weight, out=product)
    else:
        torch.addmm(bias, flat, weight, out=product)
    return output


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, settings: Any) -> Tensor:
        terms, ctx.recorded = settings
        output, hidden = _lora_output(x, dropped, terms)
        ctx.is_dropped = dropped is not None
        ctx.scaling, ctx.transposed = terms.scaling, terms.transposed
        ctx.save_for_backward(x if dropped is None else dropped, hidden, terms.weight, a, b)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, hidden, weight, a, b = ctx.saved_tensors
        with _without_autocast(x):
            g = gradients[0].reshape(-1, gradients[0].shape[-1])
            u = g.mm(b).mul_(ctx.scaling)
            grad_a, grad_b = _factor_gradients(ctx, x, hidden, g, u)
            grad_x = grad_dropped = None
            if ctx.needs_input_grad[0]:
                grad_x = g.mm(weight.t() if ctx.transposed else weight)
                grad_x = (grad_x if ctx.is_dropped else grad_x.addmm_(u, a)).view(x.shape)
            if ctx.needs_input_grad[1]:
                grad_dropped = u.mm(a).view(x.shape)
        return grad_x, grad_dropped, grad_a, grad_b, None


def _factor_gradients(ctx: Any, x: Tensor, hidden: Tensor, g: Tensor, u: Tensor) -> tuple[Any, Any]:
    """Put each record's ∂A and ∂B into its row, or return their sums over the records."""
    scaling, recorded, records = ctx.scaling, ctx.recorded, len(x)
    if recorded is None:
        grad_a = u.t().mm(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[2] else None
        grad_b = hidden.t().mm(g).mul_(scaling).t() if ctx.needs_input_grad[3] else None
        return grad_a, grad_b
    if recorded.first is not None:
        recorded.rows.add_outer(recorded.first, _by_record(u, records), _by_record(x, records))
    if recorded.second is not None:
        recorded.rows.add_outer(recorded.second, _by_record(g, records), _by_record(hidden, records), scaling)
    return None, None


class _RecordedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, recorded: Recorded) -> Tensor:
        ctx.recorded = recorded
        ctx.save_for_backward(x, weight)
        return _affine(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,), (x, weight), recorded = gradients, ctx.saved_tensors, ctx.recorded
        with _without_autocast(x):
            if recorded.first is not None:
                recorded.rows.add_outer(recorded.first, _by_record(g, len(x)), _by_record(x, len(x)))
            if recorded.second is not None:
                recorded.rows.add(recorded.second, _by_record(g, len(x)).sum(1, dtype=recorded.rows.dtype))
            grad_x = g.matmul(weight) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None


def _by_record(values: Tensor, records: int) -> Tensor:
    """View positions as (records, positions of a record, width)."""
    return values.reshape(records, -1, values.shape[-1])


def _without_autocast(x: Tensor) -> AbstractContextManager[torch.autocast | None]:
    """Keep products of float32 in float32, also where somebody runs the backward pass inside an autocast block."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
