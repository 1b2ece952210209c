"""Per-record gradients of the trainable parameters, one backward pass for a whole physical batch.

`PerSampleEngine` is the interface; `open_engine` opens the one that the plan names. Knows nothing of clipping, noise or
sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from types import TracebackType
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

from fedtune.errors import PrivacyError

Parameters = Sequence[tuple[str, nn.Parameter]]
BatchLosses = Callable[[], Tensor]


EngineName = Literal["lora", "opacus"]


class PerSampleEngine(Protocol):
    """Turns per-record losses into per-record gradients, as long as it is open."""

    def per_sample_gradients(self, batch_losses: BatchLosses, records: int) -> Tensor:
        """Return (records, P): row i is the gradient of record i's loss, flat, in the engine's own order of columns.

        The rows are valid until the next call, and the caller may overwrite them.
        """

    def arrange(self, total: Tensor) -> Tensor:
        """Bring a sum of rows (P,) from the engine's order of columns into the parameters' order."""

    def close(self) -> None:
        """Leave the model as it was found."""

    def __enter__(self) -> Self:
        """Return the engine itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()


def open_engine(name: EngineName, model: nn.Module, parameters: Parameters) -> PerSampleEngine:
    """Open the engine that a plan names; `parameters` are all trainable parameters of `model`, in the order of rows.

    `lora` runs LoRA layers as one node and writes each record's gradients in the one backward pass; `opacus` uses
    Opacus' hooks. Both give the same gradients up to rounding.
    """
    if name == "lora":
        from fedtune.privacy.lora_engine import LoraEngine

        return LoraEngine(model, parameters)
    from fedtune.privacy.opacus_engine import OpacusEngine  # imports Opacus, which takes a second

    return OpacusEngine(model, parameters)


def summed_gradient(parameters: Parameters, batch_losses: BatchLosses, records: int) -> Tensor:
    """Return Σ_i ∇loss_i (P,) in float32 (float64 for a float64 model).

    For `privacy.mode=off` only: nothing bounds one record in it.
    """
    tensors = [tensor for _, tensor in parameters]
    gradients: tuple[Tensor | None, ...] = (None,) * len(tensors)
    if records:
        with torch.enable_grad():
            losses = checked_losses(batch_losses(), records)
            gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
    pairs = zip(gradients, tensors, strict=True)
    flat = [(torch.zeros_like(tensor) if one is None else one).reshape(-1) for one, tensor in pairs]
    return torch.cat(flat).to(torch.promote_types(precision(parameters), torch.float32))


def precision(parameters: Parameters) -> torch.dtype:
    """Return the type that holds every parameter's gradient."""
    return reduce(torch.promote_types, (tensor.dtype for _, tensor in parameters))


def checked_losses(losses: Tensor, records: int) -> Tensor:
    """Return the losses if they are one a record, and refuse them otherwise."""
    if losses.shape != (records,):
        raise PrivacyError(
            "coupled-records",
            f"{records} records need as many losses, found shape {tuple(losses.shape)}; a loss over the batch couples "
            "its records.",
            hint="Compute one loss a record, see fedtune.privacy.losses.record_losses.",
        )
    return losses
