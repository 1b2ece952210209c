"""Attention whose backward pass is float32 where bfloat16 would be slow: the same function, never less precise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, DebertaV2Config, DebertaV2Model, LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedtune.model.attention import NAME, attention, use_float32_backward

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def operands(dtype: torch.dtype, heads: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((3, 2, 7, 8), (3, heads, 7, 8), (3, heads, 7, 8))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def run(function: Any, values: list[Tensor], mask: Tensor | None, groups: int = 1) -> tuple[Tensor, tuple[Tensor, ...]]:
    layer = SimpleNamespace(is_causal=False, training=False, num_key_value_groups=groups)
    output, _ = function(layer, *values, mask, dropout=0.0, scaling=0.3)
    return output, torch.autograd.grad(output.double().square().sum(), values)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("heads", [2, 1])
def test_bfloat16_is_at_least_as_near_to_float64_as_sdpa_is(kind: str, heads: int) -> None:
    allowed = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    masks = {"none": None, "bool": allowed, "additive": torch.zeros(3, 1, 7, 7).masked_fill(~allowed, -1e4)}
    mask = masks[kind]
    low = operands(torch.bfloat16, heads)
    exact = [value.detach().double().requires_grad_() for value in low]
    wide = mask.double() if kind == "additive" and mask is not None else mask
    narrow = mask.bfloat16() if kind == "additive" and mask is not None else mask
    _, expected = run(sdpa_attention_forward, exact, wide, 2 // heads)
    output, found = run(attention, low, narrow, 2 // heads)
    _, plain = run(sdpa_attention_forward, low, narrow, 2 // heads)
    assert output.dtype is torch.bfloat16
    for ours, theirs, truth in zip(found, plain, expected, strict=True):
        assert (ours - truth).norm() <= max(1.1 * (theirs - truth).norm(), 2e-2 * truth.norm())


def test_float32_is_bit_for_bit_that_of_sdpa() -> None:
    values = operands(torch.float32)
    ours, theirs = run(attention, values, None), run(sdpa_attention_forward, values, None)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(one, other) for one, other in zip(ours[1], theirs[1], strict=True))


def test_without_gradients_it_is_bit_for_bit_that_of_sdpa() -> None:
    layer = SimpleNamespace(is_causal=False, training=False)
    with torch.no_grad():
        values = operands(torch.bfloat16)
        ours = attention(layer, *values, None, scaling=0.3)[0]
        assert torch.equal(ours, sdpa_attention_forward(layer, *values, None, scaling=0.3)[0])


def test_under_autocast_the_products_are_float32() -> None:
    values = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(attention, values, None)
    theirs = run(sdpa_attention_forward, values, None)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "model",
    [BertModel(BertConfig(**SIZES)), LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=1))],
    ids=["bert", "llama"],
)
def test_a_model_computes_what_it_computed(model: Any, padded: bool) -> None:
    model.eval()
    batch = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    if padded:
        batch["attention_mask"][1, 3:] = 0
    model.set_attn_implementation("sdpa")
    expected = model(**batch).last_hidden_state
    use_float32_backward(model)
    assert model.config._attn_implementation == NAME
    assert torch.equal(model(**batch).last_hidden_state, expected)


def test_a_model_with_attention_of_its_own_keeps_it() -> None:
    model = DebertaV2Model(DebertaV2Config(**SIZES))
    before = model.config._attn_implementation
    use_float32_backward(model)
    assert model.config._attn_implementation == before
