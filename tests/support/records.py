"""A batch of records, an adapter that is alive, and per-record gradients by a plain loop, for any workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fedtune.data.batches import Batch
from fedtune.privacy.losses import IGNORED
from fedtune.training.objective import losses

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.model.workspace import Workspace

_IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 46], [1, 50, 51, 0, 0, 0, 0, 0], [1, 60, 61, 62, 63, 0, 0, 0]])


def batch_for(workspace: Workspace) -> Batch:
    """Return three records of uneven lengths with labels for the workspace's task."""
    mask = (_IDS > 0).long()
    language = workspace.task.kind == "causal-lm"
    return Batch(_IDS, mask, torch.where(mask > 0, _IDS, IGNORED) if language else torch.tensor([0, 2, 1]))


def alive(workspace: Workspace, scale: float = 0.1) -> Workspace:
    """Load an adapter whose every tensor is random, as after some rounds, and let all of it train."""
    generator = np.random.default_rng(0)
    drawn = {spec.name: generator.normal(size=spec.shape) * scale for spec in workspace.layout.tensors}
    workspace.load({name: value.astype(np.float32) for name, value in drawn.items()})
    workspace.train_only(workspace.layout)
    return workspace


def gradients(workspace: Workspace, batch: Batch) -> list[Tensor]:
    """Return the gradient of the summed losses, one tensor a parameter, zeros where there is none."""
    tensors = [workspace.parameters[name] for name in workspace.layout.names]
    total = losses(workspace, batch)().sum()
    found = torch.autograd.grad(total, tensors, allow_unused=True)
    return [torch.zeros_like(tensor) if one is None else one for one, tensor in zip(found, tensors, strict=True)]


def rows_by_loop(workspace: Workspace, batch: Batch) -> Tensor:
    """Return per-record gradients (records, P) from one pass a record."""
    singles = [
        Batch(batch.input_ids[i : i + 1], batch.attention_mask[i : i + 1], batch.labels[i : i + 1])
        for i in range(batch.records)
    ]
    return torch.stack([flat(gradients(workspace, one)) for one in singles])


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all tensors as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the distance relative to what was expected."""
    return float((found - expected).detach().norm() / expected.detach().norm())
