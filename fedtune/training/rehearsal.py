"""A rehearsal when a plan is made: three made-up records of up to five tokens go through the plan's engine.

What only a forward pass shows is refused before there is a run: a layer that puts positions before records (its rows
would be taken for records wherever a batch has as many tokens as records), one that folds tokens into the batch or is
shared by the records, and records that change each other's gradients. Reads no record.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.data.batches import Batch
from fedtune.data.templates import IGNORED
from fedtune.model.layout import AdapterLayout
from fedtune.model.workspace import Workspace
from fedtune.privacy.engines import EngineName, open_engine
from fedtune.privacy.inspection import assert_independent
from fedtune.training.objective import losses

LENGTHS = (5, 3, 4)
WIDTH = 6  # not the number of records; and more than the longest, because without padding models attend otherwise


def rehearse(workspace: Workspace, trained: AdapterLayout, engine: EngineName) -> None:
    """Raise PrivacyError, naming the layer where it is one, if this model's records cannot be told apart."""
    batch = _made_up(workspace)
    parameters = workspace.train_only(trained)
    with open_engine(engine, workspace.model, parameters) as opened:
        opened.per_sample_gradients(losses(workspace, batch), batch.rows)

    def of(tensors: Mapping[str, Tensor]) -> Tensor:
        return losses(workspace, Batch(tensors["input_ids"], tensors["attention_mask"], tensors["labels"]))()

    kept = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    assert_independent(workspace.model, of, kept)


def _made_up(workspace: Workspace) -> Batch:
    """Return records of different tokens and lengths, padded, with something to learn in each."""
    shape, vocabulary = (len(LENGTHS), WIDTH), int(workspace.peft.config.vocab_size)
    mask = (torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    tokens = torch.arange(1, 1 + shape[0] * shape[1]).view(shape) % vocabulary
    ids = torch.where(mask.bool(), tokens, workspace.pad_id)
    if workspace.task.kind == "classification":
        labels = torch.arange(shape[0]) % len(workspace.task.labels)
    else:
        labels = ids.masked_fill(mask == 0, IGNORED)
    return Batch(ids, mask, labels).to(workspace.device)
