"""The pooled classification head: one linear layer on the mean-pooled, L2-normalised embedding.

Under differential privacy a fresh pooler costs far more noise than it earns; a normalised embedding bounds each
record's head gradient by the norm of its error. Knows nothing of LoRA: the backbone may be adapted or plain.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PooledClassifier(nn.Module):
    """logits = scale · W · e, e = mean over tokens of the last hidden state, L2-normalised.

    With a `centre` µ, e = (e₀ − µ) / ‖e₀ − µ‖ of that embedding e₀: sentence embeddings share a large common part,
    which tells no class from another and would take most of the clip norm.

    Shapes: `input_ids`, `attention_mask` (batch, tokens) → logits (batch, labels) in float32 (float64 of a float64
    backbone). A record without tokens has e₀ = 0. No bias: with a normalised embedding it would be one more noisy
    direction.
    """

    centre: Tensor | None

    def __init__(self, backbone: nn.Module, width: int, labels: int, scale: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, labels, bias=False)
        nn.init.zeros_(self.head.weight)
        self.scale = scale
        self.register_buffer("centre", None)

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the normalised embedding of each record (batch, width) in float32."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        embedded = F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0), dim=-1)
        return embedded if self.centre is None else F.normalize(embedded - self.centre, dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (batch, labels)."""
        embedded = self.embed(input_ids, attention_mask)
        with torch.autocast(embedded.device.type, enabled=False):
            logits: Tensor = self.head(embedded) * self.scale
        return logits


@torch.no_grad()
def start_from_names(classifier: PooledClassifier, names: Tensor, *, centre: bool, rows: bool) -> None:
    """Use the embeddings n of the label names (labels, width): their mean µ as `centre`, (n − µ)/‖n − µ‖ as rows of W.

    Reads the label set, which is part of the plan, and no record.
    """
    mean = names.mean(0)
    if rows:
        classifier.head.weight.copy_(F.normalize(names - mean, dim=-1))
    if centre:
        classifier.centre = mean
