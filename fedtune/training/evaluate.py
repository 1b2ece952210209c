"""Measures the adapter that is in a workspace on held-out examples, without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.data.batches import Batch, collate
from fedtune.data.templates import IGNORED, Example
from fedtune.evaluation.metrics import Confusion, Tally, total
from fedtune.model.layout import AdapterState
from fedtune.model.workspace import Workspace
from fedtune.privacy.lora_layers import fused


def evaluate(workspace: Workspace, adapter: AdapterState, examples: Sequence[Example], batch_size: int) -> Tally:
    """Return the tally of an adapter on examples; tensors the adapter does not name are at the study's start."""
    workspace.load({**workspace.initial, **adapter})
    with torch.inference_mode(), fused(workspace.model):
        parts = [_tally(workspace, batch) for _, batch in batches(workspace, examples, batch_size)]
    return total(parts) if parts else _empty(workspace)


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
