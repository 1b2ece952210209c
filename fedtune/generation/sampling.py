"""Which token comes next: the likeliest, or one drawn from the likely ones. Knows no model and no text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn.

    `temperature` 0 takes the likeliest token (greedy); above, logits are divided by it. `top_p` keeps the fewest
    likeliest tokens whose probabilities reach it together (Holtzman et al., 2020, arXiv:1904.09751).
    Errors: `config.bad-sampling`.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = {
            "--max-new-tokens": self.max_new_tokens < 1 and "at least 1",
            "--temperature": not 0 <= self.temperature < float("inf") and "0 (the likeliest token) or more",
            "--top-p": not 0 < self.top_p <= 1 and "above 0 and at most 1",
        }
        for option, allowed in wrong.items():
            if allowed:
                raise ConfigError("bad-sampling", f"{option} must be {allowed}", hint="fedtune chat --help")

    def generator(self, row: int = 0) -> torch.Generator:
        """Return the random numbers of one answer: the same for a seed and a row, whatever is drawn beside it."""
        digest = hashlib.sha256(f"fedtune generation {self.seed} {row}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token from its logits (vocabulary,), float32 on the CPU."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.double() / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < sampling.top_p)
    return int(order[torch.multinomial(kept, 1, generator=generator)])
