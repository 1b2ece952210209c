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
    """logits = scale · (W · e + b), e = mean over tokens of the last hidden state, L2-normalised.

    Shapes: `input_ids`, `attention_mask` (batch, tokens) → logits (batch, labels) in float32. A record without tokens
    has e = 0.
    """

    def __init__(self, backbone: nn.Module, width: int, labels: int, scale: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.scale = scale

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the normalised embedding of each record (batch, width) in float32."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (batch, labels)."""
        logits: Tensor = self.head(self.embed(input_ids, attention_mask)) * self.scale
        return logits


@torch.no_grad()
def start_at(classifier: PooledClassifier, centres: Tensor) -> None:
    """Start the head at one direction a label: W = `centres` (labels, width), b = 0."""
    classifier.head.weight.copy_(centres)
    classifier.head.bias.zero_()
