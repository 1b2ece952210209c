"""Opacus' own private steps, put together as `PrivacyEngine.make_private` does it, without its data loader.

`hooks` forms per-record gradients in one backward pass; `ghost` finds the norms in a first and the clipped sum in a
second one. Records that were cut into several physical batches are joined as Opacus' `BatchMemoryManager` joins them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from benchmarks.dp_step.models import Subject, logits
from benchmarks.dp_step.peers import Terms, sgd
from fedtune.data.batches import Batch
from fedtune.privacy.losses import Task, record_losses


class Hooks:
    """`grad_sample_mode="hooks"`, Opacus' default."""

    def __init__(self, subject: Subject, terms: Terms) -> None:
        _expect_noise_of_backward_hooks()
        self._kind = subject.kind
        self._optimizer: Any = _optimizer(DPOptimizer, sgd(subject, terms), terms)
        self._wrapped = GradSampleModule(subject.model, loss_reduction="mean")

    def step(self, batches: Sequence[Batch], expected: float) -> None:
        """Take one step; the loss is the mean of one loss a record, so that no record's loss depends on another."""
        self._optimizer.expected_batch_size = expected
        for at, batch in enumerate(batches):
            self._optimizer.zero_grad(set_to_none=True)
            found = logits(self._wrapped, self._kind, batch)
            loss = record_losses(self._kind, found, batch.labels).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.signal_skip_step(at + 1 < len(batches))
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class Ghost:
    """`grad_sample_mode="ghost"`."""

    def __init__(self, subject: Subject, terms: Terms) -> None:
        _expect_noise_of_backward_hooks()
        self._kind = subject.kind
        self._optimizer: Any = _optimizer(DPOptimizerFastGradientClipping, sgd(subject, terms), terms)
        self._wrapped = GradSampleModuleFastGradientClipping(
            subject.model, loss_reduction="mean", max_grad_norm=terms.clip_norm, use_ghost_clipping=True
        )
        self._criterion = DPLossFastGradientClipping(self._wrapped, self._optimizer, _RecordLosses(subject.kind))

    def step(self, batches: Sequence[Batch], expected: float) -> None:
        """Take one step."""
        self._optimizer.expected_batch_size = expected
        for at, batch in enumerate(batches):
            self._optimizer.zero_grad(set_to_none=True)
            found = logits(self._wrapped, self._kind, batch)
            self._criterion(found, batch.labels).backward()
            self._optimizer.signal_skip_step(at + 1 < len(batches))
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class _RecordLosses(nn.Module):
    """One loss a record; Opacus asks a criterion for its `reduction` and sets it."""

    def __init__(self, kind: Task) -> None:
        super().__init__()
        self.reduction, self._kind = "mean", kind

    def forward(self, found: Tensor, labels: Tensor) -> Tensor:
        each = record_losses(self._kind, found, labels)
        return each if self.reduction == "none" else each.mean()


def _optimizer(kind: Any, optimizer: torch.optim.Optimizer, terms: Terms) -> Any:
    return kind(
        optimizer,
        noise_multiplier=terms.noise_multiplier,
        max_grad_norm=terms.clip_norm,
        expected_batch_size=1,
        loss_reduction="mean",
    )


def _expect_noise_of_backward_hooks() -> None:
    """Silence what PyTorch says of hooks on a layer whose input is frozen, once a layer and step."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
