"""Attention whose backward pass is not slow in bfloat16 on a CPU.

Torch's fused CPU attention runs backward in bfloat16 several times slower than in float32 (measured: see
benchmarks/dp_step/README.md). Where a gradient is wanted there, this one attends in float32 and returns bfloat16:
faster, and more precise. Everywhere else it is the SDPA of transformers, unchanged. Knows no LoRA and no privacy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "fedtune_sdpa"


def use_float32_backward(model: Any) -> None:
    """Let a model that attends by SDPA attend by `attention`; others stay as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation != "sdpa":  # noqa: SLF001 - where transformers keeps what it has chosen
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Return the attention of queries (B, heads, T, width) over keys and values, laid out as by transformers' SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not _is_slow((query, key, value)):
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return result
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        precise = (query.float(), key.float(), value.float())
        output, _ = sdpa_attention_forward(module, *precise, attention_mask=attention_mask, **settings)
    return output.to(query.dtype), None


def _is_slow(operands: tuple[Tensor, ...]) -> bool:
    """Say whether these operands would take the slow backward pass, autocast's conversion included."""
    if operands[0].device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if not any(operand.requires_grad for operand in operands):
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return cast or operands[0].dtype is torch.bfloat16
