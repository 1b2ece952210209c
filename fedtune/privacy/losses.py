"""One loss per record, each computed from that record alone.

A batch-mean loss (what `model(labels=…)` returns) divides by the tokens of the *batch*, so every record's gradient
depends on the others' lengths and clipping no longer bounds one record's influence. Knows nothing of models.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtune.errors import DataError, PrivacyError

Task = Literal["classification", "causal-lm"]
IGNORED = -100


def record_losses(kind: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the records' cross-entropies (B,) in float32 (float64 for float64 logits).

    `classification`: logits (B, K), labels (B,) in 0 … K-1.
    `causal-lm`: logits (B, T, V), labels (B, T) with -100 where nothing is to be learned. Position t predicts token
    t + 1; a record's loss is the mean over its *own* trained tokens, and 0 with zero gradient if it has none.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if kind == "classification":
        _check(logits, labels, dims=1)
        return F.cross_entropy(logits, labels, reduction="none")
    if kind == "causal-lm":
        _check(logits, labels, dims=2)
        return _causal(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED))
    raise PrivacyError("unknown-task", f"no per-record loss is defined for the task {kind!r}.")


def _causal(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log p over each record's own targets; logits and targets are flattened, which copies neither."""
    tokens = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)
    return tokens.view(targets.shape).sum(dim=1) / (targets != IGNORED).sum(dim=1).clamp(min=1)


def _check(logits: Tensor, labels: Tensor, *, dims: int) -> None:
    """Refuse labels that do not belong to these logits, before a kernel fails without saying where."""
    if labels.shape != logits.shape[:dims] or logits.ndim != dims + 1:
        raise DataError("label-shape", f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}.")
    used = labels[labels != IGNORED] if dims > 1 else labels
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= logits.shape[-1]):
        raise DataError(
            "label-range",
            f"labels reach from {int(used.min())} to {int(used.max())}, but the model has {logits.shape[-1]} outputs.",
            hint="Check that the labels and the model's head come from the same plan.",
        )
