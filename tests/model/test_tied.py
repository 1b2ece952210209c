"""Models whose output layer is their input embedding: the adapter trains right, and an adapter on both is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedtune.errors import ModelError
from fedtune.model.workspace import Workspace
from fedtune.privacy.lora_engine import LoraEngine
from fedtune.training.objective import losses
from tests.support.records import alive, batch_for, distance, flat, gradients, rows_by_loop

MakeWorkspace = Callable[..., Workspace]
TIED = ["gpt2", "gemma"]
INNER = {"gpt2": ("c_attn",), "gemma": ("q_proj",)}
EMBEDDING = {"gpt2": "wte", "gemma": "embed_tokens"}
every_tied = pytest.mark.parametrize("architecture", TIED)


@every_tied
@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_neither_end_of_a_tied_model_is_adapted_or_trained(
    workspace: MakeWorkspace, architecture: str, targets: str
) -> None:
    made = workspace(architecture, "none", lora={"targets": targets})
    ends = made.peft.get_output_embeddings(), made.peft.get_input_embeddings()
    assert ends[0].weight is ends[1].weight
    assert type(ends[0]) is nn.Linear
    assert not ends[0].weight.requires_grad
    assert not any("lm_head" in name or EMBEDDING[architecture] in name for name in made.layout.names)


@every_tied
def test_per_record_gradients_of_a_tied_model_are_those_of_a_loop_in_float64(
    workspace: MakeWorkspace, architecture: str
) -> None:
    made = alive(workspace(architecture, "none", seed=11, lora={"targets": "all-linear"}))
    made.model.double()
    try:
        batch, parameters = batch_for(made), [(name, made.parameters[name]) for name in made.layout.names]
        expected = rows_by_loop(made, batch)
        with LoraEngine(made.model, parameters) as engine:
            rows = engine.per_sample_gradients(losses(made, batch), batch.records)
            found = torch.stack([engine.arrange(row) for row in rows])
        assert distance(found, expected) < 1e-12
    finally:
        made.model.float()


@every_tied
def test_the_tie_changes_no_gradient_of_the_adapter(workspace: MakeWorkspace, architecture: str) -> None:
    """A copy whose output layer is a tensor of its own has the same gradients: nothing flows round by the embedding."""
    made = alive(workspace(architecture, "none", seed=12, lora={"targets": "all-linear"}))
    tied = flat(gradients(made, batch_for(made)))
    output = made.peft.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    assert torch.equal(flat(gradients(made, batch_for(made))), tied)


@every_tied
@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_on_a_tied_output_layer_is_refused_by_name(
    workspace: MakeWorkspace, architecture: str, *, beside: bool
) -> None:
    targets = ("lm_head", *INNER[architecture]) if beside else ("lm_head",)
    with pytest.raises(ModelError) as caught:
        workspace(architecture, "none", lora={"targets": targets})
    assert caught.value.code == "model.tied-target"
    assert "lm_head" in caught.value.message
    assert EMBEDDING[architecture] in caught.value.message
    assert "lora.targets" in caught.value.hint


@every_tied
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_peft_would_merge_such_an_adapter_into_another_model(base: Callable[[str], Path], architecture: str) -> None:
    """The control: why it is refused. Merged, the same adapter changes the embedding as well."""
    ids = torch.tensor([[1, 40, 41, 42]])
    plain = AutoModelForCausalLM.from_pretrained(base(architecture))
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()(input_ids=ids).logits
    assert (merged - before).abs().max() > 0.01


def test_an_adapter_on_an_output_layer_of_its_own_is_trained(workspace: MakeWorkspace) -> None:
    made = alive(workspace("llama", "none", lora={"targets": ("lm_head",)}))
    (spec_a, spec_b), batch = made.layout.pairs[0], batch_for(made)
    assert spec_a.layer.endswith("lm_head")
    assert spec_b.shape[0] == made.peft.config.vocab_size
    parameters = [(name, made.parameters[name]) for name in made.layout.names]
    expected = rows_by_loop(made, batch)
    with LoraEngine(made.model, parameters) as engine:
        rows = engine.per_sample_gradients(losses(made, batch), batch.records)
        found = torch.stack([engine.arrange(row) for row in rows])
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("architecture", [*TIED, "llama"])
@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_on_an_embedding_is_refused_by_name(
    workspace: MakeWorkspace, architecture: str, *, beside: bool
) -> None:
    embedding = EMBEDDING.get(architecture, "embed_tokens")
    targets = (embedding, *INNER.get(architecture, ("q_proj",))) if beside else (embedding,)
    with pytest.raises(ModelError, match=rf"{embedding}.*not only linear layers.*no-target"):
        workspace(architecture, "none", lora={"targets": targets})
