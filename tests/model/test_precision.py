"""In which type a model computes, with which attention and which base: what stays float32, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AutoQuantizationConfig

from fedtune.config.plan import ModelPlan
from fedtune.errors import ModelError
from fedtune.model.attention import NAME
from fedtune.model.base import find_base
from fedtune.model.precision import loading_options, refuse_unavailable
from fedtune.model.workspace import Workspace
from fedtune.privacy.lora_engine import LoraEngine
from fedtune.training.objective import losses
from tests.model.conftest import ModelSettings, model_words
from tests.support.bench import CASES
from tests.support.records import alive, batch_for, distance, flat, gradients, rows_by_loop

MakeWorkspace = Callable[..., Workspace]
MakeBase = Callable[[str], Path]
ROUNDING = 2.0**-8  # of one number in bfloat16


# --- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_autocast_computes_in_bfloat16_and_keeps_adapter_losses_and_gradients_in_float32(
    workspace: MakeWorkspace, architecture: str, head: str
) -> None:
    made = alive(workspace(architecture, head, autocast="bfloat16", lora={"targets": "all-linear"}))
    seen: set[torch.dtype] = set()
    handles = [layer.register_forward_hook(lambda *io: seen.add(io[2].dtype)) for layer in frozen_linear(made)]
    found = losses(made, batch_for(made))()
    for handle in handles:
        handle.remove()
    assert seen == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert {tensor.dtype for tensor in made.parameters.values()} == {torch.float32}
    assert {tensor.dtype for tensor in gradients(made, batch_for(made))} == {torch.float32}


def frozen_linear(made: Workspace) -> list[nn.Module]:
    layers = [module.get_base_layer() for module in made.model.modules() if hasattr(module, "lora_A")]
    assert layers
    return layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "head"), [case for case in CASES if case[1] != "architecture"])
def test_gradients_under_autocast_are_those_of_float32_within_bfloat16(
    workspace: MakeWorkspace, architecture: str, head: str, dtype: str
) -> None:
    exact = alive(workspace(architecture, head))
    expected = rows_by_loop(exact, batch_for(exact))
    rough = alive(workspace(architecture, head, autocast="bfloat16", dtype=dtype))
    parameters = [(name, rough.parameters[name]) for name in rough.layout.names]
    with LoraEngine(rough.model, parameters) as engine:
        rows = engine.per_sample_gradients(losses(rough, batch_for(rough)), 3)
        found = torch.stack([engine.arrange(row) for row in rows])
    assert rows.dtype == torch.float32
    assert distance(found, expected) < 16 * ROUNDING
    assert distance(found, expected) > 2e-5  # it is another precision indeed


def test_training_and_evaluation_compute_in_the_same_precision(workspace: MakeWorkspace) -> None:
    made = alive(workspace("llama", "none", autocast="bfloat16"))
    trained = made.logits(batch_for(made))
    with torch.inference_mode():
        evaluated = made.logits(batch_for(made))
    assert trained.dtype == evaluated.dtype == torch.bfloat16
    assert distance(trained.float(), evaluated.float()) < 4 * ROUNDING
    assert not torch.is_autocast_enabled("cpu")


def test_a_loaded_adapter_is_seen_at_once_under_autocast(workspace: MakeWorkspace) -> None:
    """Autocast may keep the bfloat16 copies of weights; they must not outlive a pass."""
    made = alive(workspace("llama", "none", autocast="bfloat16"))
    before = made.logits(batch_for(made))
    alive(made, scale=1.0)
    assert not torch.equal(made.logits(batch_for(made)), before)


def test_the_pooled_head_stays_in_float32_under_autocast(workspace: MakeWorkspace) -> None:
    made = alive(workspace("bert", autocast="bfloat16"))
    logits, batch = made.logits(batch_for(made)), batch_for(made)
    with made.precision():
        embedded = made.model.embed(batch.input_ids, batch.attention_mask)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, embedded @ made.model.head.weight.T)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("gpt2", "none"), ("llama", "none")])
def test_attention_kernels_agree_and_are_the_ones_asked_for(
    workspace: MakeWorkspace, architecture: str, head: str
) -> None:
    found: dict[str, Tensor] = {}
    for attention in ("eager", "sdpa"):
        made = alive(workspace(architecture, head, attention=attention))
        assert made.model.config._attn_implementation == attention
        found[attention] = flat(gradients(made, batch_for(made)))
    assert distance(found["sdpa"], found["eager"]) < 1e-5


def test_auto_is_sdpa_where_the_architecture_has_it(workspace: MakeWorkspace) -> None:
    assert workspace("llama", "none").model.config._attn_implementation == NAME
    assert workspace("deberta").model.config._attn_implementation == "eager"


# --- quantization ---------------------------------------------------------------------------------------------------


def words(base: MakeBase, **changes: Any) -> ModelPlan:
    return model_words(find_base(ModelSettings(base=str(base("llama")))), "none", **changes)


def test_4_bit_is_qloras(base: MakeBase) -> None:
    options = loading_options(words(base, quantization="4bit", dtype="bfloat16"), "cuda")
    config = AutoQuantizationConfig.from_dict(options["quantization_config"])
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert options["device_map"] == {"": "cuda"}
    assert options["dtype"] == torch.bfloat16


def test_8_bit_quantizes_each_token_by_itself(base: MakeBase) -> None:
    """With the usual threshold of 6 one record's outlier changes how all records of the batch are multiplied."""
    config = AutoQuantizationConfig.from_dict(
        loading_options(words(base, quantization="8bit"), "cuda")["quantization_config"]
    )
    assert (config.load_in_8bit, config.load_in_4bit) == (True, False)
    assert config.llm_int8_threshold == 0.0


def test_without_quantization_nothing_is_said_of_it(base: MakeBase) -> None:
    assert loading_options(words(base), "cpu") == {"dtype": torch.float32}


def refused(call: Callable[[], object], code: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        call()
    assert caught.value.code == f"model.{code}"
    assert caught.value.hint
    return caught.value


@pytest.fixture
def unreadable(own_base: Callable[..., Path]) -> Path:
    """A base whose weights cannot be loaded: what is refused here is refused before."""
    folder = own_base("llama")
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantized_base_is_refused_on_a_cpu_before_it_is_loaded(
    workspace: MakeWorkspace, unreadable: Path, quantization: str
) -> None:
    error = refused(lambda: workspace(unreadable, "none", quantization=quantization), "quantization-device")
    assert f"model.quantization={quantization}" in error.message


def test_a_missing_bitsandbytes_is_named_with_the_extra_that_brings_it(
    workspace: MakeWorkspace, unreadable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    error = refused(lambda: workspace(unreadable, "none", quantization="4bit", device="cuda"), "no-bitsandbytes")
    assert "fedtune[quant]" in error.hint


def test_an_architectures_head_is_not_trained_beside_a_quantized_base(
    workspace: MakeWorkspace, unreadable: Path
) -> None:
    refused(lambda: workspace(unreadable, "architecture", quantization="4bit", device="cuda"), "head-dtype")


def test_a_base_that_is_stored_quantized_is_refused(workspace: MakeWorkspace, own_base: Callable[..., Path]) -> None:
    folder = own_base("llama")
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    assert "bitsandbytes" in refused(lambda: workspace(folder, "none"), "quantized-base").message


# --- flash attention ------------------------------------------------------------------------------------------------


def test_flash_attention_is_refused_on_a_cpu_before_the_base_is_loaded(
    workspace: MakeWorkspace, unreadable: Path
) -> None:
    refused(lambda: workspace(unreadable, "none", attention="flash_attention_2", dtype="bfloat16"), "flash-device")


def test_flash_attention_without_its_package_is_refused(
    workspace: MakeWorkspace, unreadable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fetch a kernel from the Hub instead."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    wanted = {"attention": "flash_attention_2", "dtype": "bfloat16", "device": "cuda"}
    assert "flash_attn" in refused(lambda: workspace(unreadable, "none", **wanted), "no-flash").message


@pytest.mark.parametrize(("autocast", "dtype"), [("bfloat16", "float32"), (None, "bfloat16"), (None, "float32")])
def test_flash_attention_needs_half_precision(
    base: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autocast: str | None, dtype: str
) -> None:
    (tmp_path / "flash_attn.py").touch()  # only looked for, never imported
    monkeypatch.syspath_prepend(tmp_path)
    found = find_base(ModelSettings(base=str(base("llama"))))
    wanted = model_words(found, "none", attention="flash_attention_2", dtype=dtype)
    if autocast or dtype != "float32":
        refuse_unavailable(found, wanted, autocast, "cuda")
    else:
        refused(lambda: refuse_unavailable(found, wanted, autocast, "cuda"), "flash-dtype")


def test_attention_that_the_architecture_does_not_have_is_refused_by_name(workspace: MakeWorkspace) -> None:
    error = refused(lambda: workspace("deberta", attention="sdpa"), "no-attention")
    assert "model.attention=sdpa" in error.message
    assert error.hint == "model.attention=auto"
