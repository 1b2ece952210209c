"""What llama.cpp would not compute as training did is refused before a byte is written, with another way to go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fedtune.errors import ReleaseError
from fedtune.release.gguf import check_family, write_adapter_gguf, write_model_gguf
from tests.release.gguf.conftest import Shelf
from tests.release.gguf.made import made_adapter, made_base

Change = dict[str, Any]


def edited(folder: Path, source: Path, name: str, change: Change) -> Path:
    shutil.copytree(source, folder)
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


def refusal(write: Callable[[], object], out: Path) -> ReleaseError:
    with pytest.raises(ReleaseError) as caught:
        write()
    assert not out.exists()
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"lora_alpha": 12.5}, "release.not-canonical"),
        ({"lora_alpha": 12.0}, "release.not-canonical"),
        ({"use_dora": True}, "release.not-canonical"),
        ({"use_rslora": True}, "release.not-canonical"),
        ({"modules_to_save": ["lm_head"]}, "release.not-canonical"),
        ({"rank_pattern": {"q_proj": 8}}, "release.not-canonical"),
        ({"bias": "all"}, "release.not-canonical"),
        ({"init_lora_weights": "pissa"}, "release.not-canonical"),
        ({"trainable_token_indices": [3]}, "release.not-canonical"),
        ({"peft_type": "IA3"}, "release.not-canonical"),
        ({"task_type": "SEQ_CLS"}, "release.not-plain-lora"),
    ],
)
def test_anything_but_plain_lora_is_refused(change: Change, code: str, shelf: Shelf, tmp_path: Path) -> None:
    adapter = edited(tmp_path / "a", shelf.adapter("llama"), "adapter_config.json", change)
    out = tmp_path / "a.gguf"
    assert refusal(lambda: write_adapter_gguf(adapter, shelf.base("llama"), out), out).code == code


def test_a_head_beside_the_adapter_is_not_dropped_in_silence(shelf: Shelf, tmp_path: Path) -> None:
    adapter, out = edited(tmp_path / "a", shelf.adapter("llama"), "adapter_config.json", {}), tmp_path / "a.gguf"
    shutil.copyfile(adapter / "adapter_model.safetensors", adapter / "head.safetensors")
    assert refusal(lambda: write_adapter_gguf(adapter, shelf.base("llama"), out), out).code == "release.not-plain-lora"


def test_a_whole_module_among_the_factors_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    adapter, out = edited(tmp_path / "a", shelf.adapter("llama"), "adapter_config.json", {}), tmp_path / "a.gguf"
    state = load_file(adapter / "adapter_model.safetensors")
    state["base_model.model.model.norm.weight"] = next(iter(state.values()))[0].clone()
    save_file(state, adapter / "adapter_model.safetensors")
    assert "norm.weight" in refusal(lambda: write_adapter_gguf(adapter, shelf.base("llama"), out), out).message


@pytest.mark.parametrize(("family", "target"), [("gpt2", "wte"), ("qwen2", "embed_tokens")])
def test_an_adapter_of_an_embedding_is_refused(family: str, target: str, shelf: Shelf, tmp_path: Path) -> None:
    base, out = shelf.base(family), tmp_path / "a.gguf"
    adapter = made_adapter(tmp_path / "a", base, targets=[target])
    found = refusal(lambda: write_adapter_gguf(adapter, base, out), out)
    assert found.code in {"release.embedding-adapter", "release.not-plain-lora"}


def test_an_adapter_of_a_tied_head_is_refused_and_of_an_own_head_is_not(shelf: Shelf, tmp_path: Path) -> None:
    tied = made_base(tmp_path / "tied", "llama", tie_word_embeddings=True)
    adapter, out = made_adapter(tmp_path / "a", tied, targets=["lm_head"]), tmp_path / "a.gguf"
    assert refusal(lambda: write_adapter_gguf(adapter, tied, out), out).code == "release.embedding-adapter"
    own = made_adapter(tmp_path / "b", shelf.base("llama"), targets=["lm_head", "v_proj"])
    assert write_adapter_gguf(own, shelf.base("llama"), out).tensors == 6


def test_an_adapter_for_another_base_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    found = refusal(lambda: write_adapter_gguf(shelf.adapter("llama"), shelf.base("mistral"), out), out)
    assert found.code == "release.wrong-base"
    smaller = made_base(tmp_path / "small", "llama", num_hidden_layers=1)
    assert refusal(lambda: write_adapter_gguf(shelf.adapter("llama"), smaller, out), out).code == "release.wrong-base"


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type=yarn"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen2", {"head_dim": 32}, "head_dim"),
        ("gemma2", {"query_pre_attn_scalar": 200}, "query_pre_attn_scalar"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_a_configuration_that_llama_cpp_does_not_follow_is_refused(
    family: str, change: Change, named: str, shelf: Shelf, tmp_path: Path
) -> None:
    base, out = edited(tmp_path / "base", shelf.base(family), "config.json", change), tmp_path / "m.gguf"
    found = refusal(lambda: write_model_gguf(base, out), out)
    assert (found.code, named in found.message) == ("release.gguf-config", True)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert"},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "phi3"},
        {},
    ],
)
def test_a_family_without_a_mapping_is_refused_with_what_to_do(config: Change) -> None:
    with pytest.raises(ReleaseError) as caught:
        check_family(config)
    assert (caught.value.code, "--to merged" in caught.value.hint) == ("release.no-gguf-family", True)


def test_a_quantised_base_is_refused() -> None:
    with pytest.raises(ReleaseError, match="quantised"):
        check_family({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}})


def test_a_tensor_without_a_place_and_a_missing_one_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    base, out = edited(tmp_path / "base", shelf.base("qwen2"), "config.json", {}), tmp_path / "m.gguf"
    state = load_file(base / "model.safetensors")
    more = {**state, "model.layers.0.self_attn.q_norm.weight": state["model.norm.weight"].clone()}
    save_file(more, base / "model.safetensors", metadata={"format": "pt"})
    assert refusal(lambda: write_model_gguf(base, out), out).code == "release.no-gguf-place"
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    assert "blk.1.ffn_up.weight" in refusal(lambda: write_model_gguf(base, out), out).message


def test_an_unknown_number_format_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    assert refusal(lambda: write_model_gguf(shelf.base("llama"), out, "q4_k"), out).code == "release.unknown-dtype"
