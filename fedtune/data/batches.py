"""Batches: examples padded to one length, as tensors. Knows no model, no sampler and no privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from fedtune.data.templates import IGNORED, Example

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from fedtune.data.shapes import Shape
    from fedtune.data.tasks import Kind


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B records of at most T tokens, int64, padded on the right.

    `input_ids` and `attention_mask` are (B, T); `labels` is (B,) classes, or (B, T) tokens with `IGNORED` where no loss
    counts (padding included; not shifted). B may be 0 (a Poisson batch can be empty); then T is 0 too. The last
    `fillers` of the B rows hold no record.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    fillers: int = 0

    @property
    def records(self) -> int:
        """The number of records."""
        return self.rows - self.fillers

    @property
    def rows(self) -> int:
        """B, the number of records and fillers."""
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        ids, mask, labels = (each.to(device) for each in (self.input_ids, self.attention_mask, self.labels))
        return Batch(ids, mask, labels, self.fillers)


def collate(examples: Sequence[Example], pad_id: int, kind: Kind) -> Batch:
    """Pad examples on the right to the longest of them."""
    ids = _padded([example.input_ids for example in examples], pad_id)
    mask = _padded([np.ones_like(example.input_ids) for example in examples], 0)
    if kind == "classification":
        labels = torch.tensor([example.target for example in examples], dtype=torch.int64)
    else:
        labels = _padded([example.labels for example in examples if example.labels is not None], IGNORED)
    return Batch(ids, mask, labels)


def filled(batch: Batch, shape: Shape, pad_id: int) -> Batch:
    """Return the batch in a larger shape: records padded further, and below them fillers of one token each.

    A filler has a loss, of class 0 or of no token: its row of gradients is to be thrown away.
    """
    fillers, wider = shape.rows - batch.rows, shape.tokens - batch.input_ids.shape[1]
    ids = F.pad(batch.input_ids, (0, wider, 0, fillers), value=pad_id)
    mask = F.pad(batch.attention_mask, (0, wider, 0, fillers), value=0)
    mask[batch.rows :, 0] = 1
    tokens = batch.labels.ndim > 1
    labels = F.pad(batch.labels, (0, wider, 0, fillers) if tokens else (0, fillers), value=IGNORED if tokens else 0)
    return Batch(ids, mask, labels, fillers)


def padding_id(tokenizer: Any) -> int:
    """Return the token to pad with: any will do, because padding is masked and carries no loss."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _padded(rows: Sequence[NDArray[np.int32]], fill: int) -> Tensor:
    """Stack rows of unequal length into (B, T) int64."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), fill, np.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return torch.from_numpy(padded)
