"""What is built from a base and the plan's words, and what is refused instead of failing in the middle of a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.data.tasks import Task
from fedtune.errors import ModelError
from fedtune.model.workspace import Workspace
from tests.support.tiny import tiny_base, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

MakeWorkspace = Callable[..., Workspace]


def heads(workspace: Workspace) -> set[str]:
    return {spec.name.removeprefix("base_model.model.") for spec in workspace.layout.tensors if spec.role == "head"}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("deberta", {"classifier.weight", "classifier.bias", "pooler.dense.weight", "pooler.dense.bias"}),
        ("gpt2", {"score.weight"}),
        ("llama", {"score.weight"}),
    ],
)
def test_the_architectures_head_trains_every_module_that_the_checkpoint_lacks(
    workspace: MakeWorkspace, architecture: str, expected: set[str]
) -> None:
    assert heads(workspace(architecture, "architecture")) == expected


def test_a_head_for_other_labels_in_the_checkpoint_is_replaced(workspace: MakeWorkspace, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tiny_base(tmp_path / "base")
    config = BertConfig.from_pretrained(tmp_path / "base", num_labels=5)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    made = workspace(tmp_path / "base", "architecture")
    assert heads(made) == {"classifier.weight", "classifier.bias"}
    assert made.parameters["base_model.model.classifier.weight"].shape == (3, 16)


@pytest.mark.parametrize("head", ["pooled", "architecture"])
def test_nothing_but_the_adapter_and_the_head_wants_a_gradient(workspace: MakeWorkspace, head: str) -> None:
    made = workspace("bert", head, lora={"targets": "all-linear"})
    wanting = {id(tensor) for tensor in made.model.parameters() if tensor.requires_grad}
    assert wanting == {id(tensor) for tensor in made.parameters.values()}


def test_the_model_is_in_evaluation_mode_so_that_its_own_dropout_sleeps(workspace: MakeWorkspace) -> None:
    made = workspace("bert", "architecture", lora={"dropout": 0.3})
    assert not any(module.training for module in made.model.modules())


def test_the_same_base_and_words_are_built_once(workspace: MakeWorkspace) -> None:
    assert workspace("bert") is workspace("bert")


@pytest.mark.parametrize("head", ["pooled", "none"])
def test_a_bfloat16_base_keeps_a_float32_adapter(workspace: MakeWorkspace, head: str) -> None:
    made = workspace("llama", head, dtype="bfloat16")
    assert {tensor.dtype for tensor in made.parameters.values()} == {torch.float32}
    frozen = {tensor.dtype for tensor in made.model.parameters() if not tensor.requires_grad}
    assert frozen == {torch.bfloat16}
    assert all(value.dtype == np.float32 for value in made.initial.values())


def test_the_pooled_head_starts_at_zero_or_at_the_label_names(workspace: MakeWorkspace) -> None:
    assert not workspace("bert").initial["head.weight"].any()
    named = workspace("bert", head_init="labels").initial["head.weight"]
    assert np.allclose(np.linalg.norm(named, axis=1), 1, atol=1e-5)
    other = workspace("bert", head_init="labels", task=task("card_fee", "gold", "loan")).initial["head.weight"]
    assert not np.allclose(named, other)


def test_a_label_is_read_as_words(workspace: MakeWorkspace) -> None:
    signs = workspace("bert", head_init="labels", task=task("Card_fee?", "loan")).initial["head.weight"]
    plain = workspace("bert", head_init="labels", task=task("card fee", "loan")).initial["head.weight"]
    assert np.array_equal(signs, plain)


def task(*labels: str) -> Task:
    return Task("classification", {"text": "text", "label": "label"}, tuple(sorted(labels)))


# --- a tokenizer without a padding token ----------------------------------------------------------------------------


@pytest.fixture
def unpadded(tmp_path: Path) -> Path:
    """A GPT-2 as it is usually published: its tokenizer and configuration name no padding token."""
    folder = tiny_base(tmp_path / "unpadded", "gpt2", pad_token_id=None)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


def test_the_head_skips_the_very_token_that_batches_are_filled_with(workspace: MakeWorkspace, unpadded: Path) -> None:
    made = workspace(unpadded, "architecture")
    assert made.tokenizer.pad_token_id is None
    assert made.pad_id == made.model.config.pad_token_id == 2


def test_one_records_logits_do_not_depend_on_anothers_length(workspace: MakeWorkspace, unpadded: Path) -> None:
    made = workspace(unpadded, "architecture")
    short, filler = torch.tensor([[1, 50, 51]]), torch.full((1, 9), made.pad_id)
    padded, mask = torch.cat([short, filler], 1), torch.tensor([[1] * 3 + [0] * 9])
    with torch.no_grad():
        alone = made.model(input_ids=short, attention_mask=torch.ones_like(short)).logits
        beside = made.model(input_ids=padded, attention_mask=mask).logits
        control = made.model(input_ids=padded.masked_fill(mask == 0, 0), attention_mask=mask).logits
    assert torch.allclose(alone, beside, atol=1e-6)
    assert not torch.allclose(alone, control, atol=1e-3)  # filled with token 0 the head reads the filling


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(workspace: MakeWorkspace, code: str, *arguments: object, **changes: object) -> str:
    with pytest.raises(ModelError) as caught:
        workspace(*arguments, **changes)
    assert caught.value.code == f"model.{code}"
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
def test_sequences_longer_than_the_positions_are_refused(workspace: MakeWorkspace, architecture: str) -> None:
    message = refused(workspace, "sequence-limit", architecture, max_tokens=129)
    assert "129" in message
    assert "128" in message
    workspace(architecture, max_tokens=128)


def test_positions_that_begin_after_the_padding_are_counted(workspace: MakeWorkspace, tmp_path: Path) -> None:
    """RoBERTa's table of 40 rows holds 39 positions behind padding row 0; token 40 would be outside of it."""
    from transformers import RobertaConfig, RobertaModel

    folder = tiny_base(tmp_path / "roberta")
    config = RobertaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=40, pad_token_id=0)  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    refused(workspace, "sequence-limit", folder, max_tokens=40)
    made = workspace(folder, max_tokens=39)
    ids = torch.full((1, 39), 5)
    assert made.model(ids, torch.ones_like(ids)).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        made.model(torch.full((1, 40), 5), torch.ones(1, 40, dtype=torch.int64))


@pytest.mark.parametrize(
    ("head", "lost"), [("pooled", "layers.0.mlp.down_proj.weight"), ("none", "model.layers.0.mlp.down_proj.weight")]
)
def test_a_base_that_lacks_weights_is_refused_by_name(
    workspace: MakeWorkspace, own_base: Callable[..., Path], head: str, lost: str
) -> None:
    folder = own_base("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert lost in refused(workspace, "missing-weights", folder, head)


def test_an_encoder_without_a_language_head_is_refused_for_language_modelling(workspace: MakeWorkspace) -> None:
    refused(workspace, "missing-weights", "bert", "none")


def test_an_architecture_without_a_language_model_is_refused(workspace: MakeWorkspace) -> None:
    refused(workspace, "bad-base", "deberta", "none")


def test_damaged_weights_are_refused(workspace: MakeWorkspace, own_base: Callable[..., Path]) -> None:
    folder = own_base()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    refused(workspace, "bad-base", folder)


@pytest.mark.parametrize("change", [{"model_type": "no-such-architecture"}, {"hidden_size": 17}, {"vocab_size": 5}])
def test_a_configuration_that_does_not_fit_is_refused(
    workspace: MakeWorkspace, own_base: Callable[..., Path], change: dict[str, object]
) -> None:
    folder = own_base()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(workspace, "bad-base", folder)


def test_a_configuration_that_not_even_the_tokenizer_can_read_is_refused_with_the_reason(
    workspace: MakeWorkspace, own_base: Callable[..., Path]
) -> None:
    folder = own_base()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    assert "hidden_size" in refused(workspace, "no-tokenizer", folder)


@pytest.mark.parametrize("content", [None, "{", '{"model": 5}'])
def test_a_base_without_a_usable_tokenizer_is_refused(
    workspace: MakeWorkspace, own_base: Callable[..., Path], content: str | None
) -> None:
    folder = own_base()
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    refused(workspace, "no-tokenizer", folder)


def test_an_encoder_decoder_is_refused(workspace: MakeWorkspace, own_base: Callable[..., Path]) -> None:
    folder = own_base()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    assert "encoder-decoder" in refused(workspace, "encoder-decoder", folder)


def test_label_names_cannot_start_an_architectures_head(workspace: MakeWorkspace) -> None:
    refused(workspace, "no-pooled-head", "bert", "architecture", head_init="labels")


def test_an_architectures_head_is_not_trained_in_half_precision(workspace: MakeWorkspace) -> None:
    refused(workspace, "head-dtype", "bert", "architecture", dtype="bfloat16")
