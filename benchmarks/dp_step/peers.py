"""The steps that are compared: plain PEFT, fedtune with and without privacy; other engines have modules of their own.

A step takes one logical batch, cut into physical batches, and ends with the optimiser's step. Every peer has a copy of
the same model, the same records and the same SGD, and divides by the same expected batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.dp_step.models import Subject, logits
from fedtune.data.batches import Batch
from fedtune.privacy.clipping import ClippedSum, clip_and_sum
from fedtune.privacy.engines import summed_gradient
from fedtune.privacy.lora_engine import LoraEngine
from fedtune.privacy.lora_layers import fused
from fedtune.privacy.losses import IGNORED, Task, record_losses
from fedtune.privacy.noise import add_noise, mean_without_noise
from fedtune.privacy.random import RandomSource, SecureSource, SeededSource
from fedtune.privacy.units import unit_rows
from fedtune.training import optimizers


@dataclass(frozen=True, slots=True)
class Terms:
    """What every peer is told: C, σ, the learning rate, and which of fedtune's generators draws its noise."""

    clip_norm: float = 1.0
    noise_multiplier: float = 1.0
    learning_rate: float = 0.01
    noise: Literal["seeded", "secure"] = "seeded"


class Peer(Protocol):
    """One way to take a step."""

    def step(self, batches: Sequence[Batch], expected: float) -> None:
        """Take one optimiser step over a logical batch of about `expected` records."""


class PlainPeft:
    """What a script without privacy does: PEFT's own layers, one loss a batch, `backward`, the optimiser's step."""

    def __init__(self, subject: Subject, terms: Terms) -> None:
        self._subject = subject
        self._optimizer = sgd(subject, terms)

    def step(self, batches: Sequence[Batch], expected: float) -> None:
        """Take one step along the batch's own loss, the mean over its records or its trained tokens."""
        self._optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            found = logits(self._subject.model, self._subject.kind, batch)
            loss = batch_loss(self._subject.kind, found, batch.labels)
            loss = loss if batch.records == expected else loss * (batch.records / expected)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


class Private:
    """fedtune's private step, as `fedtune.training.local` takes it."""

    def __init__(self, subject: Subject, terms: Terms) -> None:
        self._subject, self._terms = subject, terms
        self._parameters, self._device = subject.parameters, subject.device
        self._size = sum(tensor.numel() for _, tensor in self._parameters)
        self._optimizer = sgd(subject, terms)
        self._source: RandomSource = SecureSource() if terms.noise == "secure" else SeededSource("benchmark")
        self._engine = LoraEngine(subject.model, self._parameters)

    def step(self, batches: Sequence[Batch], expected: float) -> None:
        """Clip each record, sum, add noise, divide, step."""
        clipped = ClippedSum.zero(self._size, self._terms.clip_norm, self._device)
        engine, units = self._engine, _one_a_record(batches)
        of_records = (engine.per_sample_gradients(losses(self._subject, batch), batch.records) for batch in batches)
        for rows in unit_rows(of_records, units):
            clipped += clip_and_sum(rows, self._terms.clip_norm)
        clipped = replace(clipped, total=self._engine.arrange(clipped.total))
        gradient = add_noise(clipped, self._terms.noise_multiplier, self._source, expected)
        optimizers.step(self._optimizer, self._parameters, gradient.mean, 1.0)


class NotPrivate:
    """fedtune's step with `privacy=off`: the same layers as one node, summed gradients."""

    def __init__(self, subject: Subject, terms: Terms) -> None:
        self._subject = subject
        self._parameters, self._device = subject.parameters, subject.device
        self._size = sum(tensor.numel() for _, tensor in self._parameters)
        self._optimizer = sgd(subject, terms)
        self._open = ExitStack()
        self._open.enter_context(fused(subject.model))

    def step(self, batches: Sequence[Batch], expected: float) -> None:
        """Sum, divide, step."""
        total = torch.zeros(self._size, dtype=torch.float64, device=self._device)
        for batch in batches:
            total += summed_gradient(self._parameters, losses(self._subject, batch), batch.records)
        gradient = mean_without_noise(total, expected)
        optimizers.step(self._optimizer, self._parameters, gradient.mean, 1.0)


def losses(subject: Subject, batch: Batch) -> Callable[[], Tensor]:
    """Return a function that runs the model and gives one loss a record."""
    return lambda: record_losses(subject.kind, logits(subject.model, subject.kind, batch), batch.labels)


def sgd(subject: Subject, terms: Terms) -> torch.optim.SGD:
    """Return the optimiser that every peer has."""
    members = [tensor for _, tensor in subject.parameters]
    return torch.optim.SGD([{"params": members, "initial_lr": terms.learning_rate}], lr=terms.learning_rate)


def _one_a_record(batches: Sequence[Batch]) -> list[NDArray[np.int64]]:
    """Return the unit of each record: a unit of its own."""
    numbers = np.arange(sum(batch.records for batch in batches))
    return np.split(numbers, np.cumsum([batch.records for batch in batches])[:-1])


def batch_loss(kind: Task, found: Tensor, labels: Tensor) -> Tensor:
    """Return the loss that `model(labels=…)` returns: the mean over records, or over all trained tokens."""
    found = found.float()
    if kind == "classification":
        return F.cross_entropy(found, labels)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return F.cross_entropy(found.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
