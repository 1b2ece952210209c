"""Measures an adapter on held-out examples, without gradients, and what a site may tell of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedtune.config.plan import StudyPlan
from fedtune.data.batches import Batch, collate, filled
from fedtune.data.shapes import SHARE, ShapeRule, shaped_batches
from fedtune.data.templates import IGNORED, Example
from fedtune.data.units import Units
from fedtune.errors import PrivacyError
from fedtune.evaluation.metrics import Confusion, Tally, total
from fedtune.evaluation.site_metrics import (
    Measured,
    UnitScores,
    coarse_means,
    event_of_evaluation,
    noisy_means,
    refuse_unplanned,
)
from fedtune.journal.ledger import Reservation
from fedtune.model.layout import AdapterState
from fedtune.model.workspace import Workspace
from fedtune.privacy.lora_layers import fused
from fedtune.privacy.losses import record_losses
from fedtune.privacy.random import RandomSource, SecureSource, SeededSource


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A site's held-out examples and which of them are one privacy unit."""

    site: str
    examples: Sequence[Example]
    units: Units


def measure(
    plan: StudyPlan,
    workspace: Workspace,
    held_out: HeldOut,
    number: int,
    adapter: AdapterState,
    reservation: Reservation | None,
) -> Measured:
    """Return what leaves a site after round `number` (0 is the start): the tally, rounded means or noisy ones.

    `reservation` is the ledger's proof that its event is on disk; only noisy metrics need one. Deterministic in (plan,
    site, round, adapter) with seeded noise. A site answers a round once: twice with other noise would cost twice, and
    twice with the same noise for two adapters would tell their difference. Errors: `privacy.unreserved` for noisy
    metrics without a reservation, `ledger.not-reserved` for another one's, and those of `refuse_unplanned` and
    `event_of_evaluation`.
    """
    refuse_unplanned(plan, number)
    cost = event_of_evaluation(plan)
    if reservation is not None:
        reservation.begin(plan.sha256, number, cost)
    elif cost is not None:
        raise PrivacyError("unreserved", f"round {number} would be measured without its event on disk")
    if plan.evaluation.site_metrics == "clear":
        return evaluate(workspace, adapter, held_out.examples, plan.evaluation.batch_size)
    numbers = record_numbers(plan, workspace, adapter, held_out)
    scores = UnitScores.of(numbers, held_out.units, workspace.task)
    if plan.evaluation.site_metrics == "coarse":
        return coarse_means(scores)
    return noisy_means(scores, plan.promise.evaluation_noise_multiplier, _source(plan, held_out.site, number))


def evaluate(workspace: Workspace, adapter: AdapterState, examples: Sequence[Example], batch_size: int) -> Tally:
    """Return the tally of an adapter on examples; tensors the adapter does not name are at the study's start."""
    workspace.load({**workspace.initial, **adapter})
    with torch.inference_mode(), fused(workspace.model):
        parts = [_tally(workspace, batch) for _, batch in batches(workspace, examples, batch_size)]
    return total(parts) if parts else _empty(workspace)


def record_numbers(
    plan: StudyPlan, workspace: Workspace, adapter: AdapterState, held_out: HeldOut
) -> NDArray[np.float64]:
    """Return each record's (right, loss), or its loss a token alone for language modelling: (n, d), in order.

    Where training has batches of fixed shapes, so has this: no record changes how another one's logits are rounded.
    """
    workspace.load({**workspace.initial, **adapter})
    numbers = np.zeros((len(held_out.examples), 2 if workspace.task.kind == "classification" else 1))
    with torch.inference_mode(), fused(workspace.model):
        for positions, batch in _batches(plan, workspace, held_out):
            numbers[positions] = _numbers(workspace, batch)[: batch.records]
    return numbers


def _numbers(workspace: Workspace, batch: Batch) -> NDArray[np.float64]:
    logits, kind = workspace.logits(batch), workspace.task.kind
    columns = [record_losses(kind, logits, batch.labels)]
    if kind == "classification":
        columns.insert(0, (logits.argmax(-1) == batch.labels).float())
    numbers: NDArray[np.float64] = torch.stack(columns, dim=1).double().cpu().numpy()
    return numbers


def _batches(plan: StudyPlan, workspace: Workspace, held_out: HeldOut) -> Iterator[tuple[list[int], Batch]]:
    size, examples = plan.evaluation.batch_size, held_out.examples
    if not plan.has_fixed_shapes:
        yield from batches(workspace, examples, size)
        return
    rule = ShapeRule(size * SHARE, size, None, plan.data.max_tokens)
    lengths = [len(example.input_ids) for example in examples]
    for group, shape in shaped_batches(np.arange(len(examples)), lengths, rule, held_out.units):
        batch = collate([examples[at] for at in group], workspace.pad_id, workspace.task.kind)
        yield group.tolist(), filled(batch, shape, workspace.pad_id).to(workspace.device)


def _source(plan: StudyPlan, site: str, number: int) -> RandomSource:
    if plan.promise.noise == "secure":
        return SecureSource()
    return SeededSource("evaluation", plan.seed, plan.sha256, site, number)


def batches(workspace: Workspace, examples: Sequence[Example], size: int) -> Iterator[tuple[list[int], Batch]]:
    """Yield (positions, batch) over all examples, sorted by length so that little is padding."""
    order = np.argsort([-len(example.input_ids) for example in examples], kind="stable")
    for start in range(0, len(order), size):
        positions = [int(index) for index in order[start : start + size]]
        chosen = [examples[index] for index in positions]
        yield positions, collate(chosen, workspace.pad_id, workspace.task.kind).to(workspace.device)


def _empty(workspace: Workspace) -> Tally:
    classes = len(workspace.task.labels)
    confusion = Confusion.of([], [], classes) if workspace.task.kind == "classification" else None
    return Tally(0.0, 0, 0, confusion)


def _tally(workspace: Workspace, batch: Batch) -> Tally:
    logits = workspace.logits(batch).float()
    if workspace.task.kind == "classification":
        return _classified(logits, batch.labels, len(workspace.task.labels))
    return _language(logits, batch.labels)


def _classified(logits: Tensor, labels: Tensor, classes: int) -> Tally:
    loss = float(F.cross_entropy(logits, labels, reduction="sum"))
    confusion = Confusion.of(labels.cpu().numpy(), logits.argmax(-1).cpu().numpy(), classes)
    return Tally(loss, len(labels), 0, confusion)


def _language(logits: Tensor, labels: Tensor) -> Tally:
    targets = labels[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return Tally(float(loss), len(labels), int((targets != IGNORED).sum()))
