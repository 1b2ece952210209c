"""LoRA's dropout with masks from the site's own random source instead of torch's global generator.

A record's mask depends on its place in the batch, and that place on which other records were drawn. Masks known to an
outsider would therefore couple the records: one more record shifts all others' masks, and the clipped sum moves by far
more than the clip norm. Drawn from the stream that also draws the noise, masks are as secret as the noise is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedtune.privacy.random import RandomSource


class SourcedDropout(nn.Module):
    """Zeroes each number with probability p and scales the rest by 1 / (1 - p), while it has a `source`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.source: RandomSource | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Return the values (records, …), dropped independently of each other."""
        if self.source is None:
            return values
        kept = np.asarray(self.source.uniform(values.numel()) >= self.p)
        mask = torch.from_numpy(kept).view(values.shape).to(values.device)
        return values * mask / (1.0 - self.p)


def replace_dropout(adapted: nn.Module) -> None:
    """Put sourced dropout in the place of PEFT's; without dropout PEFT has an identity there, which stays."""
    for name, holder in adapted.named_modules():
        if name.endswith("lora_dropout") and isinstance(holder, nn.ModuleDict):
            for key, layer in holder.items():
                if isinstance(layer, nn.Dropout):
                    holder[key] = SourcedDropout(layer.p)
