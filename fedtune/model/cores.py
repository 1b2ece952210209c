"""The layer of `fedsb`: W0·x + s·B·R·A·x, with a trained core R (r, r) between two frozen factors.

PEFT has no such layer, so its module B is replaced by one that holds the same B and, before it, a linear layer R. PEFT
calls it as it calls its own; a per-record engine sees one linear layer. Merging such a layer would need B·R, which is
what `Algorithm.server.update` gives: a released adapter is plain LoRA.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ADAPTER = "default"


class CoredFactor(nn.Module):
    """B·R in the place of PEFT's B: `weight` (d_out, r) is B, `core.weight` (r, r) is R and starts at zero."""

    def __init__(self, factor: nn.Linear) -> None:
        super().__init__()
        self.weight = factor.weight
        rank = factor.weight.shape[1]
        self.core = nn.Linear(rank, rank, bias=False, device=factor.weight.device, dtype=factor.weight.dtype)
        nn.init.zeros_(self.core.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return B·R·h (…, d_out) of h (…, r)."""
        return F.linear(self.core(hidden), self.weight)


def add_cores(adapted: nn.Module) -> None:
    """Put a core into every LoRA layer of a model that PEFT has adapted."""
    for module in adapted.modules():
        factors = getattr(module, "lora_B", None)
        if isinstance(factors, nn.ModuleDict) and ADAPTER in factors:
            factor = factors[ADAPTER]
            assert isinstance(factor, nn.Linear)  # noqa: S101 - fedtune adapts linear layers alone
            factors[ADAPTER] = CoredFactor(factor)
