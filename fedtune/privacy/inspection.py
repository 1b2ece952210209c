"""Whether a model mixes records: refused by name where known, and shown by a probe where not.

Per-record clipping bounds one record's influence only if no other record's gradient depends on it. Knows nothing of
how per-record gradients are computed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedtune.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Class names of routed layers: MixtralExperts, DbrxExpertGLU, JambaTopKRouter, DeepseekV3MoE, NllbMoeSparseMLP.
ROUTED = re.compile(r"Experts?(GLU)?$|Router$|Mo[eE]$|Sparse(MoE|Moe|MLP)")


def refuse_coupled(model: nn.Module) -> None:
    """Raise PrivacyError, naming the layer, if the model holds a layer known to mix records.

    BatchNorm is refused in evaluation mode too: the next `model.train()` would mix again. Mixture-of-experts layers
    flatten the batch's tokens and may drop some where an expert is full, so one record decides about another's.
    """
    for name, layer in model.named_modules():
        reason = _mixes(layer)
        if reason:
            raise PrivacyError(
                "coupled-records",
                f"the layer {name or type(layer).__name__} ({type(layer).__name__}) {reason}.",
                hint="Choose a base model without such layers, or privacy.mode=off for a study without privacy.",
            )


def _mixes(layer: nn.Module) -> str:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base class of every BatchNorm
        return "normalises over the batch, so each record changes all others' gradients"
    if getattr(layer, "track_running_stats", False):
        return "keeps running statistics of the records outside the noisy update"
    if ROUTED.search(type(layer).__name__):
        return "routes the tokens of the whole batch together, so records are no longer separate"
    return ""


def assert_independent(
    model: nn.Module, batch_losses: Callable[[Mapping[str, Tensor]], Tensor], batch: Mapping[str, Tensor]
) -> None:
    """Raise PrivacyError if one record's loss or gradient changes with the other records of its batch.

    `batch` maps names to tensors whose first dimension is B ≥ 2 records; `batch_losses(batch)` returns (B,) losses. The
    first and the last record are each held while all others are replaced by a copy of it, with the same random numbers
    and the same shapes. The loss and its gradient with respect to the trainable parameters must stay the same up to
    rounding (a LoRA adapter starts at B = 0, where coupling shows in the gradient alone). Finding nothing is
    evidence for this batch, not a proof.
    """
    records = len(next(iter(batch.values())))
    if records < 2:  # noqa: PLR2004 - coupling needs two
        raise PrivacyError("probe", "the independence probe needs a batch of at least two records.")
    trainable = [tensor for tensor in model.parameters() if tensor.requires_grad]
    for kept in (0, records - 1):
        alone = {name: tensor[kept].expand_as(tensor).contiguous() for name, tensor in batch.items()}
        pairs = zip(
            _trace(batch_losses, batch, kept, trainable), _trace(batch_losses, alone, kept, trainable), strict=True
        )
        if any(not _same(one, other) for one, other in pairs):
            raise PrivacyError(
                "coupled-records",
                f"the loss of record {kept} of a batch changes when the other records change.",
                hint="Compute one loss a record, normalised by its own tokens, on a model that keeps records apart.",
            )


def _trace(
    batch_losses: Callable[[Mapping[str, Tensor]], Tensor],
    batch: Mapping[str, Tensor],
    kept: int,
    trainable: list[nn.Parameter],
) -> list[Tensor]:
    """One record's loss and its gradients, under a fixed seed."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        losses = batch_losses(batch)
        if losses.shape != (len(next(iter(batch.values()))),):
            raise PrivacyError("coupled-records", f"the loss has shape {tuple(losses.shape)}, not one value a record.")
        found = [losses[kept].detach()]
        if trainable and losses.requires_grad:
            gradients = torch.autograd.grad(losses[kept], trainable, allow_unused=True)
            found += [torch.zeros(()) if gradient is None else gradient for gradient in gradients]
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of the type they were computed in."""
    slack = max(1e-4, 8 * torch.finfo(one.dtype).eps)
    scale = max(float(one.norm()), float(other.norm()), 1e-3)
    return float((one.double() - other.double()).norm()) <= slack * scale
