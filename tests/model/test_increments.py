"""Base weights that a study adds to: W0 + s·B·A, the same bits whatever was loaded before, and W0 again without any."""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.data.batches import Batch
from fedtune.errors import ModelError
from fedtune.model.workspace import Workspace

MakeWorkspace = Callable[..., Workspace]
IDS = torch.tensor([[1, 40, 41, 42], [1, 50, 51, 0]])
BATCH = Batch(IDS, (IDS > 0).long(), torch.tensor([0, 2]))
SCALE = 2.0  # alpha 4 over rank 2
models = pytest.mark.parametrize(
    ("architecture", "head"), [("bert", "pooled"), ("deberta", "architecture"), ("gpt2", "none"), ("llama", "none")]
)


def increments(workspace: Workspace, seed: int = 0, rank: int = 3, layers: int | None = None) -> dict[str, np.ndarray]:
    draw, found = np.random.default_rng(seed), {}
    for A, B in workspace.layout.pairs[:layers]:
        found[f"drift/{A.name}"] = (0.3 * draw.standard_normal((rank, A.shape[1]))).astype(np.float32)
        found[f"drift/{B.name}"] = (0.3 * draw.standard_normal((B.shape[0], rank))).astype(np.float32)
    return found


def base_weights(workspace: Workspace) -> dict[str, torch.Tensor]:
    """Return every tensor of the model but the adapter's own."""
    own = {id(parameter) for parameter in workspace.parameters.values()}
    named = [*workspace.model.named_parameters(), *workspace.model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named if id(tensor) not in own}


def fresh(made: Workspace) -> Workspace:
    made.load(made.initial)
    return made


def logits(workspace: Workspace, state: Any) -> torch.Tensor:
    workspace.load({**workspace.initial, **state})
    with torch.no_grad():
        return workspace.logits(BATCH).clone()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@models
def test_the_weight_is_w0_plus_the_scaled_product_and_nothing_else_moves(
    workspace: MakeWorkspace, architecture: str, head: str
) -> None:
    made = fresh(workspace(architecture, head))
    before, state = base_weights(made), increments(made)
    made.load({**made.initial, **state})
    after = base_weights(made)
    touched = set()
    for A, B in made.layout.pairs:
        (name,) = [name for name in after if name.removeprefix("backbone.") == f"{A.layer}.base_layer.weight"]
        product = SCALE * np.einsum(
            "or,ri->oi", state[f"drift/{B.name}"].astype(float), state[f"drift/{A.name}"].astype(float)
        )
        change = product.T if architecture == "gpt2" else product
        assert np.allclose(after[name].double().numpy() - before[name].double().numpy(), change, atol=1e-6)
        touched.add(name)
    assert all(torch.equal(after[name], before[name]) for name in after if name not in touched)


@models
def test_the_model_is_the_one_with_the_same_factors_as_its_adapter(
    workspace: MakeWorkspace, architecture: str, head: str
) -> None:
    made = fresh(workspace(architecture, head))
    state = increments(made, rank=2)
    adapter = {name.removeprefix("drift/"): array for name, array in state.items()}
    zero = {B.name: np.zeros(B.shape, np.float32) for _, B in made.layout.pairs}
    assert torch.allclose(logits(made, {**zero, **state}), logits(made, adapter), rtol=1e-4, atol=1e-5)


@models
def test_a_state_without_increments_brings_the_base_back_bit_for_bit(
    workspace: MakeWorkspace, architecture: str, head: str
) -> None:
    made = fresh(workspace(architecture, head))
    before, state = base_weights(made), increments(made)
    made.load(state)
    assert not equal(base_weights(made), before)
    made.load({})
    assert equal(base_weights(made), before)


@given(order=st.lists(st.integers(0, 3), min_size=1, max_size=8))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_loaded_before_changes_no_bit(workspace: MakeWorkspace, order: list[int]) -> None:
    """Sites of one process hold different rounds; each load is W0 and its own increments, never a sum of visits."""
    made = fresh(workspace("gpt2", "none"))
    states = [{}, increments(made, 1), increments(made, 2, rank=5), increments(made, 3, layers=1)]
    alone = []
    for state in states:
        made.load({})
        made.load(state)
        alone.append(base_weights(made))
    for at in order:
        made.load({**made.initial, **states[at]})
        assert equal(base_weights(made), alone[at])
    made.load({})


def test_loading_the_same_again_costs_no_copy_and_changes_no_bit(workspace: MakeWorkspace) -> None:
    made = fresh(workspace("bert"))
    state = increments(made)
    made.load(state)
    once = base_weights(made)
    made.load({name: array.copy() for name, array in state.items()})
    assert equal(base_weights(made), once)
    made.load({})


def test_an_array_that_is_changed_in_place_afterwards_is_not_taken_for_the_same(workspace: MakeWorkspace) -> None:
    made = fresh(workspace("bert"))
    state = increments(made)
    made.load(state)
    for array in state.values():
        np.multiply(array, 2, out=array)
    made.load(state)
    found = base_weights(made)
    made.load({})
    made.load({name: array.copy() for name, array in state.items()})
    assert equal(base_weights(made), found)
    made.load({})


def test_increments_are_no_tensors_of_the_adapter(workspace: MakeWorkspace) -> None:
    made = fresh(workspace("bert"))
    made.load(increments(made))
    assert set(made.export(made.layout)) == set(made.layout.names)
    assert all(np.array_equal(array, made.initial[name]) for name, array in made.export(made.layout).items())
    assert not any(parameter.requires_grad for name, parameter in made.model.named_parameters() if "base_layer" in name)
    made.load({})


def test_a_layer_that_is_not_adapted_is_refused_and_leaves_the_base_as_it_was(workspace: MakeWorkspace) -> None:
    made = fresh(workspace("bert"))
    before, stranger = base_weights(made), {"drift/x.lora_A.weight": np.ones((1, 2), np.float32)}
    with pytest.raises(ModelError, match=r"model\.unknown-tensor"):
        made.load({**increments(made), **stranger})
    assert equal(base_weights(made), before)


def test_a_base_that_would_round_them_off_is_refused_with_what_to_set(workspace: MakeWorkspace) -> None:
    made = fresh(workspace("llama", "none", dtype="bfloat16"))
    before = base_weights(made)
    with pytest.raises(ModelError, match=r"model\.rounded-base") as caught:
        made.load(increments(made))
    assert "model.dtype=float32" in caught.value.hint
    made.load({})
    assert equal(base_weights(made), before)
