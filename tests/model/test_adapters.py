"""Which layers are adapted, what their tensors are called, and where they start."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from scipy.stats import kstest

from fedtune.errors import ModelError
from fedtune.model.adapters import canonical_name, initial_factors
from fedtune.model.layout import AdapterLayout, TensorSpec
from fedtune.model.workspace import Workspace
from tests.support.bench import CASES
from tests.support.tiny import tiny_base

if TYPE_CHECKING:
    from pathlib import Path


MakeWorkspace = Callable[..., Workspace]


def adapted_layers(workspace: Workspace) -> set[str]:
    return {spec.layer.rsplit(".", 1)[-1] for spec in workspace.layout.tensors if spec.layer}


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_canonical_names_are_those_of_a_saved_peft_adapter(
    workspace: MakeWorkspace, architecture: str, head: str, targets: str
) -> None:
    made = workspace(architecture, head, lora={"targets": targets})
    saved = get_peft_model_state_dict(made.peft, save_embedding_layers=False)
    ours = {spec.name: spec.shape for spec in made.layout.tensors if not spec.name.startswith("head.")}
    assert ours == {name: tuple(tensor.shape) for name, tensor in saved.items()}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("bert", {"query", "value"}),
        ("deberta", {"query_proj", "value_proj"}),
        ("gpt2", {"c_attn"}),
        ("llama", {"q_proj", "v_proj"}),
        ("gemma", {"q_proj", "v_proj"}),
        ("qwen2", {"q_proj", "v_proj"}),
    ],
)
def test_auto_is_pefts_choice(workspace: MakeWorkspace, architecture: str, expected: set[str]) -> None:
    assert adapted_layers(workspace(architecture)) == expected


def test_auto_leaves_out_what_deberta_shares_between_records(workspace: MakeWorkspace, tmp_path: Path) -> None:
    """With shared attention keys the query layer also projects relative positions: one gradient for all records."""
    folder = tiny_base(tmp_path / "v3", "deberta", share_att_key=True)
    assert adapted_layers(workspace(folder)) == {"value_proj"}


@pytest.mark.parametrize(
    ("shared", "left"), [(True, {"value_proj", "dense"}), (False, {"query_proj", "key_proj", "value_proj", "dense"})]
)
def test_all_linear_leaves_out_what_deberta_shares_between_records(
    workspace: MakeWorkspace, tmp_path: Path, *, shared: bool, left: set[str]
) -> None:
    folder = tiny_base(tmp_path / "v3", "deberta", share_att_key=shared)
    assert adapted_layers(workspace(folder, lora={"targets": "all-linear"})) == left


def test_all_linear_is_every_linear_layer_but_the_head(workspace: MakeWorkspace) -> None:
    assert adapted_layers(workspace("bert", lora={"targets": "all-linear"})) == {"query", "key", "value", "dense"}
    layers = adapted_layers(workspace("gpt2", "none", lora={"targets": "all-linear"}))
    assert layers == {"c_attn", "c_proj", "c_fc"}


def test_a_fresh_pooler_is_trained_in_full_and_not_adapted_as_well(workspace: MakeWorkspace) -> None:
    made = workspace("deberta", "architecture", lora={"targets": "all-linear"})
    assert not any("pooler" in spec.name for spec in made.layout.tensors if spec.role != "head")


def test_a_list_adapts_what_it_names(workspace: MakeWorkspace) -> None:
    made = workspace("bert", lora={"targets": ("key", "intermediate.dense")})
    assert adapted_layers(made) == {"key", "dense"}
    assert len(made.layout.pairs) == 2


@pytest.mark.parametrize("targets", [("q_proj",), ("query", "q_proj"), ("uery",), ("word_embeddings",)])
def test_a_list_that_is_not_wholly_linear_layers_of_the_model_is_refused_with_their_names(
    workspace: MakeWorkspace, targets: tuple[str, ...]
) -> None:
    with pytest.raises(ModelError) as caught:
        workspace("bert", lora={"targets": targets})
    assert caught.value.code == "model.no-target"
    assert "dense, key, query, value" in caught.value.message
    assert "lora.targets" in caught.value.hint


def test_layers_restrict_the_targets(workspace: MakeWorkspace, tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "deep", "bert", num_hidden_layers=3)
    made = workspace(folder, lora={"layers": (0, 2)})
    assert {spec.layer.split(".layer.")[1].split(".")[0] for spec in made.layout.tensors if spec.layer} == {"0", "2"}


@pytest.mark.parametrize("layers", [(3,), (0, 3)])
@pytest.mark.parametrize("targets", ["auto", "all-linear", ("query",)])
def test_a_layer_that_the_model_does_not_have_is_refused(
    workspace: MakeWorkspace, tmp_path: Path, targets: Any, layers: tuple[int, ...]
) -> None:
    folder = tiny_base(tmp_path / "deep", "bert", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lora\.layers .*no-layer") as caught:
        workspace(folder, lora={"targets": targets, "layers": layers})
    assert caught.value.hint


def test_all_linear_can_be_restricted_to_layers(workspace: MakeWorkspace, tmp_path: Path) -> None:
    folder = tiny_base(tmp_path / "deep", "bert", num_hidden_layers=3)
    made = workspace(folder, lora={"targets": "all-linear", "layers": (1,)})
    assert len(made.layout.pairs) == 6
    assert all(".layer.1." in spec.layer for spec in made.layout.tensors if spec.layer)


def test_conv1d_layers_are_named_in_the_refusal_too(workspace: MakeWorkspace) -> None:
    with pytest.raises(ModelError, match="c_attn, c_fc, c_proj"):
        workspace("gpt2", "none", lora={"targets": ("query",)})


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_shapes_are_those_of_the_factors_also_for_transposed_layers(
    workspace: MakeWorkspace, architecture: str
) -> None:
    for spec_a, spec_b in workspace(architecture).layout.pairs:
        wide = 48 if architecture == "gpt2" else 16  # c_attn makes query, key and value at once
        assert (spec_a.shape, spec_b.shape) == ((2, 16), (wide, 2))


def test_names_lose_only_what_peft_does_not_save() -> None:
    assert canonical_name("backbone.base_model.model.a.q.lora_A.default.weight") == "base_model.model.a.q.lora_A.weight"
    saved = "base_model.model.classifier.bias"
    assert canonical_name("base_model.model.classifier.modules_to_save.default.bias") == saved
    assert canonical_name("head.weight") == "head.weight"


# --- the start ------------------------------------------------------------------------------------------------------

WIDE = AdapterLayout(
    (
        TensorSpec("x.lora_A.weight", (64, 300), "lora_A", "x"),
        TensorSpec("x.lora_B.weight", (20, 64), "lora_B", "x"),
        TensorSpec("y.lora_A.weight", (64, 300), "lora_A", "y"),
        TensorSpec("y.lora_B.weight", (20, 64), "lora_B", "y"),
    )
)


def test_a_is_uniform_as_peft_draws_it_and_b_is_zero() -> None:
    factors = initial_factors(WIDE, "uniform", seed=1)
    bound = 1 / np.sqrt(300)
    assert kstest(factors["x.lora_A.weight"].ravel(), "uniform", args=(-bound, 2 * bound)).pvalue > 1e-4
    theirs = torch.empty(64, 300)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(theirs, a=np.sqrt(5))  # what peft does
    assert kstest(factors["x.lora_A.weight"].ravel(), theirs.numpy().ravel()).pvalue > 1e-4
    assert not factors["x.lora_B.weight"].any()


@pytest.mark.parametrize("shape", [(4, 300), (64, 300), (8, 8), (40, 16)])
def test_an_orthonormal_start_has_orthonormal_rows_or_columns(shape: tuple[int, int]) -> None:
    layout = AdapterLayout((TensorSpec("x.lora_A.weight", shape, "lora_A", "x"),))
    drawn = initial_factors(layout, "orthonormal", seed=1)["x.lora_A.weight"].astype(np.float64)
    assert drawn.shape == shape
    product = drawn @ drawn.T if shape[0] <= shape[1] else drawn.T @ drawn
    assert np.allclose(product, np.eye(min(shape)), atol=1e-6)


def test_the_start_depends_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    one = initial_factors(WIDE, "uniform", seed=1)
    torch.manual_seed(2)
    same = initial_factors(AdapterLayout(WIDE.tensors[:2]), "uniform", seed=1)
    assert np.array_equal(one["x.lora_A.weight"], same["x.lora_A.weight"])
    assert not np.array_equal(one["x.lora_A.weight"], one["y.lora_A.weight"])
    assert not np.array_equal(one["x.lora_A.weight"], initial_factors(WIDE, "uniform", seed=2)["x.lora_A.weight"])


def test_the_start_is_pinned_because_a_frozen_a_is_never_sent() -> None:
    """Other numbers here would silently split a study between two versions of fedtune."""
    drawn = initial_factors(WIDE, "uniform", seed=7)["x.lora_A.weight"]
    assert drawn.dtype == np.float32
    assert drawn[0, :3].tolist() == pytest.approx(PINNED, rel=1e-6)


@pytest.mark.parametrize("head", ["pooled", "architecture"])
def test_a_built_model_starts_there_whatever_torchs_generator_says(workspace: MakeWorkspace, head: str) -> None:
    starts: list[dict[str, Any]] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        workspace("gpt2")  # the one model that is kept in memory is another, so that the next is built again
        starts.append(dict(workspace("bert", head).initial))
    assert all(np.array_equal(starts[0][name], starts[1][name]) for name in starts[0])
    layout = workspace("bert", head).layout
    for name, value in initial_factors(layout, "uniform", seed=3).items():
        assert np.array_equal(value, starts[0][name])


PINNED = [-0.0107848281, 0.0145062590, -0.0402777568]
