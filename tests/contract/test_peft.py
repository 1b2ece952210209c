"""What fedtune relies on in PEFT beyond its documented surface; a failure names what moved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def bert(kind: type[PreTrainedModel] = BertModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES, num_labels=3)).to(dtype)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16))


def adapted(model: PreTrainedModel, task: str = "FEATURE_EXTRACTION", **changes: object) -> PeftModel:
    words = {"target_modules": ["query"], "r": 2, "lora_alpha": 4, "task_type": task, **changes}
    return get_peft_model(model, LoraConfig(**words))


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("bert", {"query", "value"}),
        ("deberta-v2", {"query_proj", "value_proj"}),
        ("gpt2", {"c_attn"}),
        ("llama", {"q_proj", "v_proj"}),
        ("gemma", {"q_proj", "v_proj"}),
        ("qwen2", {"q_proj", "v_proj"}),
    ],
)
def test_the_default_targets_are_a_mapping_by_model_type(architecture: str, names: set[str]) -> None:
    assert set(DEFAULTS[architecture]) == names


def test_saved_names_are_parameter_names_without_the_adapters_name() -> None:
    model = adapted(bert(BertForSequenceClassification), "SEQ_CLS", modules_to_save=["pooler"])
    live = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    expected = {name.replace(".modules_to_save.default.", ".").replace(".default.weight", ".weight") for name in live}
    assert set(get_peft_model_state_dict(model, save_embedding_layers=False)) == expected
    assert "base_model.model.classifier.weight" in expected  # PEFT adds the head of SEQ_CLS by itself
    assert "base_model.model.bert.pooler.dense.weight" in expected


def test_only_factors_and_saved_modules_want_a_gradient() -> None:
    model = adapted(bert(BertForSequenceClassification), "SEQ_CLS")
    wanting = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert all("lora_" in name or "modules_to_save.default" in name for name in wanting)
    assert any("original_module" in name for name, _ in model.named_parameters())


def test_a_release_is_two_files_and_a_card(tmp_path: Path) -> None:
    model = adapted(bert())
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert saved.keys() == live.keys()
    assert all(torch.equal(saved[name], live[name]) for name in live)


def test_the_name_of_the_base_is_taken_from_the_configuration(tmp_path: Path) -> None:
    model = adapted(bert())
    model.peft_config["default"].base_model_name_or_path = "a-name"
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "a-name"


def test_by_default_saving_asks_the_hub_which_is_why_it_is_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def note(name: str, _file: str) -> bool:
        asked.append(name)
        return False

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", note)
    model = adapted(bert())
    model.peft_config["default"].base_model_name_or_path = "a-name"
    model.save_pretrained(str(tmp_path / "one"), save_embedding_layers=False)
    assert asked == []
    model.save_pretrained(str(tmp_path / "two"))
    assert asked == ["a-name"]


def test_factors_on_a_bfloat16_base_are_float32_and_a_saved_head_is_not() -> None:
    model = adapted(bert(BertForSequenceClassification, torch.bfloat16), "SEQ_CLS")
    types = {name: tensor.dtype for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {kind for name, kind in types.items() if "lora_" in name} == {torch.float32}
    # This is why an architecture's own head is refused in bfloat16.
    assert {kind for name, kind in types.items() if "classifier" in name} == {torch.bfloat16}


def test_dropout_is_a_module_of_its_own_in_a_dictionary_by_adapter() -> None:
    holders = [
        module for name, module in adapted(bert(), lora_dropout=0.2).named_modules() if name.endswith("lora_dropout")
    ]
    assert [type(holder) for holder in holders] == [nn.ModuleDict]
    assert type(holders[0]["default"]) is nn.Dropout
    plain = [module for name, module in adapted(bert()).named_modules() if name.endswith("lora_dropout")]
    assert type(plain[0]["default"]) is nn.Identity


def test_the_replaced_dropout_is_what_the_layer_calls() -> None:
    model = adapted(bert(), lora_dropout=0.2).eval()
    (holder,) = [module for name, module in model.named_modules() if name.endswith("lora_dropout")]
    called: list[int] = []

    class Seen(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            called.append(len(values))
            return values

    holder["default"] = Seen()
    model(input_ids=torch.ones(3, 4, dtype=torch.int64))
    assert called == [3]


def test_factors_have_the_same_shapes_on_a_transposed_layer() -> None:
    model = adapted(gpt2(), "CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    shapes = {name.split(".")[-2]: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    assert shapes == {"lora_A": (2, 8), "lora_B": (24, 2)}


def test_the_layer_computes_w_plus_alpha_over_rank_b_a() -> None:
    model = adapted(bert())
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    nn.init.normal_(layer.lora_B["default"].weight)
    update = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    values = torch.randn(5, 8)
    expected = values @ (layer.base_layer.weight + update).T + layer.base_layer.bias
    assert torch.allclose(layer(values), expected, atol=1e-6)


def test_b_starts_at_zero_and_a_does_not() -> None:
    for name, tensor in get_peft_model_state_dict(adapted(bert()), save_embedding_layers=False).items():
        assert bool(tensor.any()) == ("lora_A" in name)


def test_targets_that_match_nothing_are_a_value_error_and_partly_unmatched_ones_are_not() -> None:
    with pytest.raises(ValueError, match="target"):
        adapted(bert(), target_modules=["nothing"])
    adapted(bert(), target_modules=["query", "nothing"])  # which is why every target is checked


def test_the_word_all_linear_cannot_be_restricted_to_layers() -> None:
    with pytest.raises(ValueError, match="layers_to_transform"):
        adapted(bert(), target_modules="all-linear", layers_to_transform=[0])


# --- what fedtune/privacy/lora_layers.py knows of PEFT's LoRA layer ---------------------------------------------------


def query(model: PeftModel) -> Linear:
    found = model.base_model.model.encoder.layer[0].attention.self.query
    nn.init.normal_(found.lora_B["default"].weight)
    return found


def test_plain_lora_on_linear_and_conv1d_is_one_class_exactly() -> None:
    assert type(query(adapted(bert()))) is Linear
    on_conv1d = adapted(gpt2(), "CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    assert type(on_conv1d.base_model.model.transformer.h[0].attn.c_attn) is Linear
    embedded = adapted(bert(), target_modules=["word_embeddings"])
    assert type(embedded.base_model.model.embeddings.word_embeddings) is not Linear


def test_factors_are_linear_layers_without_bias_in_dictionaries_by_adapter() -> None:
    layer = query(adapted(bert()))
    for factors in (layer.lora_A, layer.lora_B):
        assert type(factors) is nn.ModuleDict
        assert set(factors) == {"default"}
        assert type(factors["default"]) is nn.Linear
        assert factors["default"].bias is None
    with_bias = query(adapted(bert(), lora_bias=True))
    assert with_bias.lora_B["default"].bias is not None


def test_the_active_adapters_are_a_list_of_names_that_follows_a_switch() -> None:
    model = adapted(bert())
    layer = query(model)
    assert layer.active_adapters == ["default"]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"))
    assert layer.active_adapters == ["default"]
    model.set_adapter("other")
    assert layer.active_adapters == ["other"]
    model.base_model.set_adapter(["default", "other"])
    assert layer.active_adapters == ["default", "other"]


def test_a_layer_holds_factors_of_its_own_adapters_only() -> None:
    model = adapted(bert(), target_modules=["query", "value"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["value"], task_type="FEATURE_EXTRACTION"))
    model.set_adapter("other")
    assert "other" not in query(model).lora_A


def test_the_frozen_layer_is_the_base_layer_and_a_bias_of_it_can_be_trained() -> None:
    layer = query(adapted(bert()))
    assert type(layer.base_layer) is nn.Linear
    assert not any(tensor.requires_grad for tensor in layer.base_layer.parameters())
    assert query(adapted(bert(), bias="lora_only")).base_layer.bias.requires_grad


def test_variants_are_registered_by_adapter_and_plain_lora_is_none() -> None:
    assert query(adapted(bert())).lora_variant == {}
    for plain in ({"use_rslora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}):
        assert "default" not in query(adapted(bert(), **plain)).lora_variant
    assert "default" in query(adapted(bert(), use_dora=True)).lora_variant


@pytest.mark.parametrize(("words", "factor"), [({}, 2.0), ({"use_rslora": True}, 4 / 2**0.5)])
def test_the_scaling_is_a_number_by_adapter(words: dict[str, object], factor: float) -> None:
    scaling = query(adapted(bert(), **words)).scaling
    assert set(scaling) == {"default"}
    assert scaling["default"] == pytest.approx(factor)


def test_without_dropout_the_input_comes_back_as_the_same_object() -> None:
    values = torch.randn(3, 8)
    assert query(adapted(bert())).lora_dropout["default"](values) is values


def test_disabled_and_merged_are_seen_on_the_layer() -> None:
    model = adapted(bert())
    layer = query(model)
    assert (layer.disable_adapters, layer.merged) == (False, False)
    with model.disable_adapter():
        assert (layer.disable_adapters, layer.merged) == (True, False)
    model.merge_adapter()
    assert (layer.disable_adapters, layer.merged) == (False, True)
    model.unmerge_adapter()
    assert (layer.disable_adapters, layer.merged) == (False, False)


def test_the_forward_is_the_base_plus_the_scaled_product_on_the_dropped_input() -> None:
    """What runs as one node must be the same function; other arguments are PEFT's own affair."""
    layer = query(adapted(bert(), lora_dropout=0.5)).train()
    values = torch.randn(3, 5, 8)
    torch.manual_seed(0)
    found = layer(values)
    torch.manual_seed(0)
    dropped = layer.lora_dropout["default"](values)
    adapter = layer.lora_B["default"](layer.lora_A["default"](dropped)) * layer.scaling["default"]
    assert torch.allclose(found, layer.base_layer(values) + adapter, atol=1e-6)


def test_on_a_bfloat16_base_the_output_has_the_bases_type() -> None:
    layer = query(adapted(bert(dtype=torch.bfloat16)))
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_forward_on_the_instance_is_what_a_call_runs() -> None:
    """So a layer can run as one node and stay the same object of the same class."""
    layer = query(adapted(bert()))
    vars(layer)["forward"] = lambda values: values + 1
    assert torch.equal(layer(torch.zeros(2, 8)), torch.ones(2, 8))
    del vars(layer)["forward"]
    assert layer.forward.__func__ is Linear.forward


def test_dora_and_embedding_factors_have_no_layer_that_runs_on_records() -> None:
    """Which is why a per-record engine refuses them by name."""
    dora = query(adapted(bert(), use_dora=True))
    assert dora.lora_magnitude_vector["default"].weight.requires_grad
    seen: list[torch.Size] = []
    dora.lora_A["default"].register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0].shape))
    dora(torch.randn(3, 5, 8))
    assert torch.Size([8, 8]) in seen  # A is also run on a unit matrix
    embedded = adapted(bert(), target_modules=["word_embeddings"]).base_model.model.embeddings.word_embeddings
    assert type(embedded.lora_embedding_A) is nn.ParameterDict
