"""The objective of one batch: one loss per record, from the workspace's logits.

One loss per record is what makes the per-record gradient bounded and independent of the other records: a mean over the
batch's tokens would not be (see docs/privacy.md).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fedtune.data.batches import Batch
from fedtune.model.workspace import Workspace
from fedtune.privacy.losses import record_losses


def losses(workspace: Workspace, batch: Batch) -> Callable[[], Tensor]:
    """Return a function that runs the model forward and gives the losses (records,)."""
    return lambda: record_losses(workspace.task.kind, workspace.logits(batch), batch.labels)
