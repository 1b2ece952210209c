"""Computing a layer twice saves memory and changes nothing else: not a bit of a gradient, not a draw, not a mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedtune.errors import ModelError
from fedtune.model.checkpointing import checkpointable, checkpointed
from fedtune.model.dropout import SourcedDropout
from fedtune.model.workspace import Workspace
from fedtune.privacy.lora_engine import LoraEngine
from fedtune.privacy.random import SeededSource
from fedtune.training.objective import losses
from tests.support.bench import CASES
from tests.support.records import alive, batch_for, flat, gradients
from tests.support.tiny import tiny_base

MakeWorkspace = Callable[..., Workspace]
MakeBase = Callable[[str], Path]


def pair(
    workspace: MakeWorkspace, folder: Path, head: str, *, dropout: float = 0.0, **words: Any
) -> tuple[Workspace, Workspace]:
    """The same adapted model without and with checkpointing."""
    lora = {"targets": "all-linear", "dropout": dropout}
    made = alive(workspace(folder, head, lora=lora, checkpointing=True, **words))
    return replace(made, recomputed=()), made


def gradients_with_masks(made: Workspace) -> Tensor:
    with made.dropout(SeededSource("masks")):
        return flat(gradients(made, batch_for(made)))


def rows(made: Workspace) -> Tensor:
    batch = batch_for(made)
    parameters = [(name, made.parameters[name]) for name in made.layout.names]
    with LoraEngine(made.model, parameters) as engine, made.dropout(SeededSource("masks")):
        return engine.per_sample_gradients(losses(made, batch), batch.records).clone()


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_gradients_are_the_same_bit_for_bit_also_with_dropout(
    workspace: MakeWorkspace, deep: MakeBase, architecture: str, head: str
) -> None:
    kept, recomputed = pair(workspace, deep(architecture), head, dropout=0.4)
    assert len(recomputed.recomputed) == 3
    assert torch.equal(gradients_with_masks(recomputed), gradients_with_masks(kept))


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("deberta", "architecture"), ("gpt2", "none")])
def test_per_record_gradients_are_the_same_bit_for_bit(
    workspace: MakeWorkspace, deep: MakeBase, architecture: str, head: str, dropout: float, autocast: str | None
) -> None:
    kept, recomputed = pair(workspace, deep(architecture), head, dropout=dropout, autocast=autocast)
    assert torch.equal(rows(recomputed), rows(kept))
    assert rows(kept).abs().sum() > 0


@pytest.mark.parametrize("per_record", [False, True])
@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("deberta", "architecture"), ("llama", "none")])
def test_activations_inside_the_layers_are_not_kept(
    workspace: MakeWorkspace, deep: MakeBase, architecture: str, head: str, *, per_record: bool
) -> None:
    kept, recomputed = pair(workspace, deep(architecture), head)
    batch = batch_for(kept)
    inputs = 3 * batch.input_ids.numel() * 16 * 4  # what each of three layers of width 16 keeps instead
    assert saved_bytes(recomputed, per_record=per_record) + inputs < saved_bytes(kept, per_record=per_record) / 2


def saved_bytes(made: Workspace, *, per_record: bool) -> int:
    """What autograd holds between the forward and the backward pass, parameters left out."""
    held: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in made.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows(made) if per_record else losses(made, batch_for(made))()
    return sum(held.values())


# --- dropout --------------------------------------------------------------------------------------------------------


def test_masks_drawn_anew_in_the_second_pass_would_give_another_gradient(
    workspace: MakeWorkspace, deep: MakeBase
) -> None:
    """The control: torch's checkpoint alone, without the memory of masks."""
    kept, _ = pair(workspace, deep("llama"), "none", dropout=0.4)
    expected = gradients_with_masks(kept)
    layers = checkpointable(kept.model)
    for layer in layers:
        vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        assert not torch.allclose(gradients_with_masks(kept), expected, rtol=0.1)
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def test_the_second_pass_draws_nothing(workspace: MakeWorkspace, deep: MakeBase) -> None:
    after = []
    for made in pair(workspace, deep("llama"), "none", dropout=0.4):
        source = SeededSource("masks")
        with made.dropout(source):
            gradients(made, batch_for(made))
        after.append(source.uniform(4))
    assert np.array_equal(after[0], after[1])


def test_a_backward_pass_after_the_source_is_gone_sees_the_masks_of_the_forward_pass(
    workspace: MakeWorkspace, deep: MakeBase
) -> None:
    kept, recomputed = pair(workspace, deep("llama"), "none", dropout=0.4)
    tensors = [recomputed.parameters[name] for name in recomputed.layout.names]
    with recomputed.dropout(SeededSource("masks")):
        total = losses(recomputed, batch_for(recomputed))().sum()
    with recomputed.dropout(SeededSource("others")):
        found = torch.autograd.grad(total, tensors)
    assert torch.equal(flat(list(found)), gradients_with_masks(kept))


def test_a_forward_pass_without_dropout_stays_without_it_in_the_second_pass(
    workspace: MakeWorkspace, deep: MakeBase
) -> None:
    kept, recomputed = pair(workspace, deep("llama"), "none", dropout=0.4)
    tensors = [recomputed.parameters[name] for name in recomputed.layout.names]
    total = losses(recomputed, batch_for(recomputed))().sum()
    with recomputed.dropout(SeededSource("masks")):
        found = torch.autograd.grad(total, tensors)
    assert torch.equal(flat(list(found)), flat(gradients(kept, batch_for(kept))))


def test_two_forward_passes_keep_their_masks_apart_and_each_can_be_walked_back_twice(
    workspace: MakeWorkspace, deep: MakeBase
) -> None:
    kept, recomputed = pair(workspace, deep("llama"), "none", dropout=0.4)
    found = []
    for made in (kept, recomputed):
        tensors = [made.parameters[name] for name in made.layout.names]
        with made.dropout(SeededSource("masks")):
            totals = [losses(made, batch_for(made))().sum() for _ in range(2)]
        found.append([flat(list(torch.autograd.grad(t, tensors, retain_graph=True))) for t in (*totals, totals[0])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(found[1][0], found[1][2])
    assert not torch.equal(found[1][0], found[1][1])


# --- what stays as it was -------------------------------------------------------------------------------------------


def test_the_bases_own_dropout_sleeps_and_no_module_is_in_training_mode(workspace: MakeWorkspace) -> None:
    made = workspace("bert", checkpointing=True)
    assert made.model.config.hidden_dropout_prob > 0
    assert torch.equal(made.logits(batch_for(made)), replace(made, recomputed=()).logits(batch_for(made)))
    assert not any(module.training for module in made.model.modules())


def test_torchs_generator_is_neither_read_nor_moved(workspace: MakeWorkspace) -> None:
    made = alive(workspace("llama", "none", lora={"dropout": 0.4}, checkpointing=True))
    before = torch.get_rng_state()
    gradients_with_masks(made)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_have_their_own_forward_outside_of_the_block_also_after_an_error(workspace: MakeWorkspace) -> None:
    made = workspace("bert", checkpointing=True)
    beyond = replace(batch_for(made), input_ids=torch.full_like(batch_for(made).input_ids, 10**6))
    with pytest.raises(IndexError):
        made.logits(beyond)
    assert not any("forward" in vars(layer) for layer in made.recomputed)
    with checkpointed(made.recomputed):
        assert all("forward" in vars(layer) for layer in made.recomputed)
    assert not any("forward" in vars(layer) for layer in made.recomputed)


def test_evaluation_computes_each_layer_once(workspace: MakeWorkspace) -> None:
    made = workspace("bert", checkpointing=True)
    calls: list[int] = []
    handle = made.recomputed[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        found = made.logits(batch_for(made))
    handle.remove()
    assert calls == [1]
    assert not found.requires_grad


# --- which layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Albert", "MPNet"])
def test_an_architecture_without_such_layers_is_refused_by_name(
    workspace: MakeWorkspace, tmp_path: Path, kind: str
) -> None:
    import transformers

    folder = tiny_base(tmp_path / "other")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(vocab_size=300, embedding_size=16, pad_token_id=0, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    with pytest.raises(ModelError, match=rf"{kind.lower()}.*no-checkpointing") as caught:
        workspace(folder, lora={"targets": "all-linear"}, checkpointing=True)
    assert "training.gradient_checkpointing=false" in caught.value.hint


class Layer(GradientCheckpointingLayer):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Linear(6, 6)
        self.dropout = SourcedDropout(0.5)
        self.inner = inner or nn.Identity()

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.inner(torch.tanh(self.weight(self.dropout(values))))
        return result


def test_a_layer_inside_of_another_is_part_of_it() -> None:
    first, second = Layer(Layer()), Layer()
    model = nn.Sequential(first, second)
    assert checkpointable(model) == (first, second)
    values = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for layers in ((), checkpointable(model)):
        with_masks(model, SeededSource("masks"))
        with checkpointed(layers):
            total = model(values).sum()
        found.append(flat(list(torch.autograd.grad(total, list(model.parameters())))))
    assert torch.equal(*found)


def with_masks(model: nn.Module, source: SeededSource) -> None:
    for module in model.modules():
        if isinstance(module, SourcedDropout):
            module.source = source
