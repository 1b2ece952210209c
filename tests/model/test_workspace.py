"""One model, many adapters: what goes in comes out, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedtune.data.batches import Batch
from fedtune.errors import ModelError
from fedtune.model.dropout import SourcedDropout
from fedtune.model.layout import AdapterLayout
from fedtune.model.workspace import Workspace, named_trainable
from fedtune.privacy.random import SeededSource

if TYPE_CHECKING:
    from fedtune.model.layout import AdapterState

MakeWorkspace = Callable[..., Workspace]
IDS = torch.tensor([[1, 40, 41, 42], [1, 50, 51, 0]])
BATCH = Batch(IDS, (IDS > 0).long(), torch.tensor([0, 2]))


def anything(workspace: Workspace, seed: int = 0) -> AdapterState:
    generator = np.random.default_rng(seed)
    return {spec.name: generator.normal(size=spec.shape).astype(np.float32) for spec in workspace.layout.tensors}


@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("gpt2", "none"), ("deberta", "architecture")])
def test_what_is_loaded_is_exported_bit_for_bit(workspace: MakeWorkspace, architecture: str, head: str) -> None:
    made = workspace(architecture, head)
    state = anything(made)
    made.load(state)
    found = made.export(made.layout)
    assert found.keys() == state.keys()
    assert all(np.array_equal(found[name], state[name]) for name in state)


def test_a_bfloat16_base_round_trips_float32_adapters(workspace: MakeWorkspace) -> None:
    made = workspace("llama", "none", dtype="bfloat16")
    state = anything(made)
    made.load(state)
    assert all(np.array_equal(value, state[name]) for name, value in made.export(made.layout).items())
    assert made.logits(BATCH).isfinite().all()


def test_loading_changes_the_named_tensors_and_no_other(workspace: MakeWorkspace) -> None:
    made = workspace("bert")
    made.load(made.initial)
    before = {name: tensor.detach().clone() for name, tensor in made.model.state_dict().items()}
    spec = made.layout.pairs[0][1]
    made.load({spec.name: np.ones(spec.shape, np.float32)})
    changed = {name for name, tensor in made.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 1
    assert "lora_B" in changed.pop()


def test_an_export_is_a_copy(workspace: MakeWorkspace) -> None:
    made = workspace("bert")
    made.load(made.initial)
    taken = made.export(made.layout)
    made.load(anything(made))
    assert all(np.array_equal(taken[name], made.initial[name]) for name in taken)


def test_a_loaded_state_is_not_shared_with_the_model(workspace: MakeWorkspace) -> None:
    made = workspace("bert")
    state = {name: value.copy() for name, value in anything(made).items()}
    made.load(state)
    for value in state.values():
        value.fill(0)
    assert all(value.any() for value in made.export(made.layout).values())


def test_an_adapter_with_one_more_tensor_or_another_shape_is_refused(workspace: MakeWorkspace) -> None:
    made = workspace("bert")
    with pytest.raises(ModelError, match=r"model\.unknown-tensor"):
        made.load({"base_model.model.other.lora_A.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ModelError, match=r"model\.wrong-shape"):
        made.load({made.layout.names[0]: np.zeros((1, 1), np.float32)})


def test_a_zero_b_predicts_as_the_base_does(workspace: MakeWorkspace) -> None:
    made = workspace("gpt2", "none")
    made.load(made.initial)
    with torch.no_grad(), made.peft.disable_adapter():
        plain = made.logits(BATCH)
    assert torch.equal(made.logits(BATCH), plain)


def test_the_update_has_the_scale_alpha_over_rank(workspace: MakeWorkspace) -> None:
    """The effective ΔW is s·B·A with s = alpha / rank, for a transposed Conv1D as well."""
    made = workspace("gpt2", "none", lora={"rank": 2, "alpha": 6.0})
    state = anything(made)
    made.load(state)
    spec_a, spec_b = made.layout.pairs[0]
    layer = made.peft.get_submodule(spec_a.layer)
    found = layer.get_delta_weight("default").detach().numpy()
    assert np.allclose(found.T, 3.0 * state[spec_b.name] @ state[spec_a.name], rtol=1e-4, atol=1e-5)
    assert found.shape == (16, 48)


def test_gradients_flow_to_the_chosen_tensors_alone(workspace: MakeWorkspace) -> None:
    made = workspace("bert")
    chosen = made.layout.without("lora_A")
    found = made.train_only(chosen)
    assert tuple(name for name, _ in found) == chosen.names
    assert {name for name, tensor in made.parameters.items() if tensor.requires_grad} == set(chosen.names)
    made.train_only(made.layout)
    assert all(tensor.requires_grad for tensor in made.parameters.values())


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing-trainable"):
        named_trainable(torch.nn.Linear(2, 2).requires_grad_(False))


# --- dropout --------------------------------------------------------------------------------------------------------


def dropped(workspace: Workspace, source: Any) -> torch.Tensor:
    with torch.no_grad(), workspace.dropout(source):
        return workspace.logits(BATCH)


@pytest.fixture
def leaky(workspace: MakeWorkspace) -> Workspace:
    made = workspace("llama", "none", lora={"dropout": 0.4})
    made.load(anything(made))
    return made


def test_a_mask_is_repeated_by_its_stream_and_by_nothing_else(leaky: Workspace) -> None:
    torch.manual_seed(1)
    one = dropped(leaky, SeededSource("a"))
    torch.manual_seed(2)
    assert torch.equal(one, dropped(leaky, SeededSource("a")))
    assert not torch.equal(one, dropped(leaky, SeededSource("b")))


def test_dropout_neither_reads_nor_moves_the_global_generator(leaky: Workspace) -> None:
    before = torch.get_rng_state()
    dropped(leaky, SeededSource("a"))
    assert torch.equal(torch.get_rng_state(), before)


def test_outside_of_the_block_nothing_is_dropped_also_after_an_error(leaky: Workspace) -> None:
    plain = leaky.logits(BATCH)
    with pytest.raises(KeyboardInterrupt), leaky.dropout(SeededSource("a")):
        raise KeyboardInterrupt
    assert torch.equal(leaky.logits(BATCH), plain)
    assert not any(module.training for module in leaky.model.modules())


def test_without_dropout_no_randomness_is_drawn(workspace: MakeWorkspace) -> None:
    made = workspace("llama", "none")
    source = SeededSource("a")
    dropped(made, source)
    assert np.array_equal(source.uniform(3), SeededSource("a").uniform(3))


def test_each_number_is_dropped_with_its_probability_and_the_mean_stays() -> None:
    layer, values = SourcedDropout(0.3), torch.ones(50, 400)
    layer.source = SeededSource("masks")
    found = layer(values)
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.allclose(found[found > 0], torch.tensor(1 / 0.7))


def test_gradients_pass_the_same_mask() -> None:
    layer, values = SourcedDropout(0.5), torch.ones(4, 6, requires_grad=True)
    layer.source = SeededSource("masks")
    found = layer(values)
    found.sum().backward()
    assert torch.equal(values.grad, found.detach())


def test_an_empty_layout_exports_nothing(workspace: MakeWorkspace) -> None:
    assert workspace("bert").export(AdapterLayout(())) == {}
