"""`fedsb`'s layer: W0·x + s·B·R·A·x, trained in R alone, and the same model as plain LoRA with (A, B·R)."""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data.batches import Batch
from fedtune.model.workspace import Workspace
from tests.support.bench import Bench, make_bench
from tests.support.reference_round import error, reference_round

MakeWorkspace = Callable[..., Workspace]
IDS = torch.tensor([[1, 40, 41, 42], [1, 50, 51, 0]])
BATCH = Batch(IDS, (IDS > 0).long(), torch.tensor([0, 2]))
models = pytest.mark.parametrize(
    ("architecture", "head"), [("bert", "pooled"), ("deberta", "architecture"), ("gpt2", "none"), ("llama", "none")]
)


def core_of(layer: str) -> str:
    return f"{layer}.lora_R.weight"


def anything(workspace: Workspace, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        spec.name: (0.5 * generator.normal(size=spec.shape)).astype(np.float32) for spec in workspace.layout.tensors
    }


def logits(workspace: Workspace, state: Any) -> torch.Tensor:
    workspace.load(state)
    with torch.no_grad():
        return workspace.logits(BATCH).clone()


@models
def test_every_layer_has_one_core_of_the_plans_rank_between_the_factors_that_it_had(
    workspace: MakeWorkspace, architecture: str, head: str
) -> None:
    plain = workspace(architecture, head).layout
    cored = workspace(architecture, head, cores=True).layout
    cores = {spec.name: spec.shape for spec in cored.tensors if spec.role == "lora_R"}
    assert cores == {core_of(A.layer): (2, 2) for A, _ in plain.pairs}
    assert cored.without("lora_R") == plain


@models
def test_it_is_the_plain_adapter_whose_b_is_b_times_r(workspace: MakeWorkspace, architecture: str, head: str) -> None:
    cored = workspace(architecture, head, cores=True)
    state = anything(cored)
    with_core = logits(cored, state)
    folded = {name: array for name, array in state.items() if "lora_R" not in name}
    for A, B in cored.layout.pairs:
        folded[B.name] = (state[B.name].astype(float) @ state[core_of(A.layer)]).astype(np.float32)
    plain = workspace(architecture, head)
    assert torch.allclose(logits(plain, folded), with_core, rtol=1e-4, atol=1e-5)
    turned = {name: array.T.copy() if "lora_R" in name else array for name, array in state.items()}
    cored = workspace(architecture, head, cores=True)
    assert not torch.allclose(logits(cored, turned), with_core, rtol=1e-2, atol=1e-3)


@models
def test_a_core_of_zero_is_the_base(workspace: MakeWorkspace, architecture: str, head: str) -> None:
    cored = workspace(architecture, head, cores=True)
    state = anything(cored)
    quiet = {name: np.zeros_like(array) if "lora_R" in name else array for name, array in state.items()}
    heads = {spec.name: state[spec.name] for spec in cored.layout.tensors if spec.role == "head"}
    found = logits(cored, quiet)
    plain = workspace(architecture, head)
    assert torch.allclose(found, logits(plain, {**plain.initial, **heads}), rtol=1e-5, atol=1e-6)
    assert all(not np.any(cored.initial[core_of(A.layer)]) for A, _ in cored.layout.pairs)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    torch.set_num_threads(1)

    def make(architecture: str, head: str, **keys: Any) -> Bench:
        folder = tmp_path_factory.mktemp("cores")
        return make_bench(folder, architecture, head, aggregation__algorithm="fedsb", **keys)

    return make


@pytest.mark.parametrize("mode", ["dp", "off"])
@models
def test_a_round_trains_the_cores_as_one_record_after_the_other_says(
    site: Callable[..., Bench], architecture: str, head: str, mode: str
) -> None:
    """Also where the layers are computed in one fused step, and where each record's gradient is clipped."""
    bench = site(architecture, head, privacy__mode=mode)
    start = dict(bench.alive())
    result = bench.round(adapter=start)
    assert set(result.state) == {
        spec.name for spec in bench.workspace.layout.tensors if spec.role in {"lora_R", "head"}
    }
    assert error(result.state, reference_round(bench, start), start) < 1e-4


@models
def test_a_round_leaves_both_factors_bit_for_bit(site: Callable[..., Bench], architecture: str, head: str) -> None:
    bench = site(architecture, head)
    start = dict(bench.alive())
    result = bench.round(adapter=start)
    live = bench.workspace.export(bench.workspace.layout)
    for A, B in bench.workspace.layout.pairs:
        assert np.array_equal(live[A.name], start[A.name])
        assert np.array_equal(live[B.name], start[B.name])
        assert not np.array_equal(result.state[core_of(A.layer)], start[core_of(A.layer)])


def test_the_reference_engine_sees_the_same_gradients(site: Callable[..., Bench]) -> None:
    bench = site("bert", "pooled")
    start = dict(bench.alive())
    other = bench.plan_with(privacy__engine="opacus")
    expected = reference_round(other, start)
    assert error(other.round(adapter=start).state, expected, start) < 1e-4


def test_cores_stay_float32_on_a_bfloat16_base(workspace: MakeWorkspace) -> None:
    cored = workspace("llama", "none", cores=True, dtype="bfloat16")
    assert {cored.parameters[core_of(A.layer)].dtype for A, _ in cored.layout.pairs} == {torch.float32}
    state = anything(cored)
    assert logits(cored, state).isfinite().all()
    assert all(np.array_equal(array, state[name]) for name, array in cored.export(cored.layout).items())
