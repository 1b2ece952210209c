"""Logits of what comes next, for several prompts at once, with a cache of keys and values. Chooses no token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedtune.model.workspace import Workspace


class Decoder:
    """The continuation of some prompts, token by token.

    Prompts of unequal length are filled up on their left; the filling is masked and positions are counted without it,
    so that a prompt's logits do not depend on the others but for rounding.
    """

    def __init__(self, workspace: Workspace, prompts: Sequence[Sequence[int]]) -> None:
        self._workspace = workspace
        self._cache: Any = None
        longest = max(map(len, prompts))
        missing = [longest - len(prompt) for prompt in prompts]
        filled = [[workspace.pad_id] * gap + list(prompt) for gap, prompt in zip(missing, prompts, strict=True)]
        self._tokens = torch.tensor(filled, device=workspace.device)
        self._mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in missing], device=workspace.device)
        self._uneven = any(missing)

    def logits(self) -> Tensor:
        """Return the logits after what is known so far: (prompts, vocabulary), float32 on the CPU."""
        given: dict[str, Any] = {
            "input_ids": self._tokens,
            "attention_mask": self._mask,
            "past_key_values": self._cache,
        }
        if self._uneven:
            given["position_ids"] = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -self._tokens.shape[1] :]
        if "logits_to_keep" in _arguments(self._workspace):
            given["logits_to_keep"] = 1  # of a prompt only the last logits are needed
        with torch.inference_mode(), self._workspace.precision():
            output = self._workspace.model(**given, use_cache=True)
        self._cache = output.past_key_values
        result: Tensor = output.logits[:, -1].float().cpu()
        return result

    def append(self, tokens: Sequence[int]) -> None:
        """Add one token to each prompt."""
        self._tokens = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._tokens)], dim=1)


def window_of(workspace: Workspace) -> int | None:
    """Return how many tokens the base can see at once, or None where it names no limit."""
    found = getattr(workspace.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
    return int(found) if found and found > 0 else None


def can_mix_lengths(workspace: Workspace) -> bool:
    """Whether prompts of unequal length may share a batch: only where positions can be given."""
    return "position_ids" in _arguments(workspace)


def _arguments(workspace: Workspace) -> frozenset[str]:
    """Return what the base's forward takes, under PEFT's, which passes everything on."""
    return frozenset(inspect.signature(workspace.peft.get_base_model().forward).parameters)
