"""What fedtune relies on in PEFT beyond its documented surface; a failure names what moved."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
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
