"""What the files say, computed by an independent NumPy reference, is what transformers and PEFT compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedtune.release.gguf import write_adapter_gguf, write_model_gguf
from fedtune.release.gguf.layout import pair_rotary
from tests.release.gguf import forward
from tests.release.gguf.conftest import Shelf
from tests.release.gguf.made import FAMILIES, adapted_model, logits_of

TEXT = "The patient's pressure was 120/80 and  won't\n\nrise, naïve Lily said."
# The largest difference of a logit whose standard deviation is about 1.2; float32 is rounding alone.
ERRORS = {"f32": 3e-5, "f16": 0.03, "q8_0": 0.25}


def ids_of(base: Path) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_adapter_compute_what_peft_computes(family: str, shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base(family), shelf.adapter(family)
    model = forward.Opened(write_model_gguf(base, tmp_path / "m.gguf", "f32").path)
    lora = forward.Opened(write_adapter_gguf(adapter, base, tmp_path / "a.gguf", "f32").path)
    ids = ids_of(base)
    plain, adapted = logits_of(adapted_model(base), ids), logits_of(adapted_model(base, adapter), ids)
    assert np.abs(forward.logits(model, ids) - plain).max() < ERRORS["f32"]
    assert np.abs(forward.logits(model, ids, lora) - adapted).max() < ERRORS["f32"]
    assert np.abs(adapted - plain).max() > 10 * ERRORS["q8_0"] / 2  # the adapter does something


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_shorter_numbers_stay_within_their_error(family: str, dtype: str, shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base(family), shelf.adapter(family)
    model = forward.Opened(write_model_gguf(base, tmp_path / "m.gguf", dtype).path)
    lora = forward.Opened(write_adapter_gguf(adapter, base, tmp_path / "a.gguf", dtype).path)
    ids = ids_of(base)
    error = np.abs(forward.logits(model, ids, lora) - logits_of(adapted_model(base, adapter), ids)).max()
    assert ERRORS["f32"] < error < ERRORS[dtype]


def test_vectors_stay_exact_and_rows_that_32_does_not_divide_fall_to_f16(shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base("llama"), shelf.adapter("llama")
    kinds = forward.Opened(write_model_gguf(base, tmp_path / "m.gguf", "q8_0").path).kinds
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.1.attn_q.bias"] == "F32"
    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_down.weight"] == "Q8_0"
    kinds = forward.Opened(write_adapter_gguf(adapter, base, tmp_path / "a.gguf", "q8_0").path).kinds
    assert kinds["blk.0.attn_q.weight.lora_a"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight.lora_b"] == "F16"  # rank 4


def test_the_wrong_rotary_order_would_be_seen(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.base("llama")
    model = forward.Opened(write_model_gguf(base, tmp_path / "m.gguf", "f32").path)
    ids = ids_of(base)
    model.tensors["blk.0.attn_q.weight"] = pair_rotary(model.tensors["blk.0.attn_q.weight"], 4)
    assert np.abs(forward.logits(model, ids) - logits_of(adapted_model(base), ids)).max() > 100 * ERRORS["f32"]


def test_rotary_pairs_become_neighbours() -> None:
    rows = np.arange(8, dtype=np.float32)  # two heads of four: halves (0, 1 | 2, 3) and (4, 5 | 6, 7)
    assert pair_rotary(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
