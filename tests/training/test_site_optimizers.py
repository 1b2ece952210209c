"""The site's optimiser is torch's, driven by flat gradients; its state survives a trip to disk bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save
from torch import nn

from fedtune.config.schema import TrainingSettings
from fedtune.model.layout import AdapterLayout, TensorSpec
from fedtune.training.optimizers import dump_state, load_state, make_optimizer, schedule_factor, step
from tests.support.bench import Bench

if TYPE_CHECKING:
    from collections.abc import Sequence

MakeBench = Callable[..., Bench]
LAYOUT = AdapterLayout(
    (
        TensorSpec("head.weight", (2, 3), "head"),
        TensorSpec("x.lora_A.weight", (2, 4), "lora_A", "x"),
        TensorSpec("x.lora_B.weight", (3, 2), "lora_B", "x"),
    )
)
KINDS = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    {"optimizer": "adamw", "weight_decay": 0.1},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["sgd", "momentum", "adamw"])
Named = tuple[tuple[str, nn.Parameter], ...]


def tensors() -> Named:
    generator = torch.Generator().manual_seed(0)
    return tuple((spec.name, nn.Parameter(torch.randn(spec.shape, generator=generator))) for spec in LAYOUT.tensors)


def gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(LAYOUT.size, generator=generator) for _ in range(count)]


def settings(**kind: Any) -> TrainingSettings:
    return TrainingSettings(learning_rate=0.1, **kind)


def walk(optimizer: torch.optim.Optimizer, named: Named, flats: Sequence[torch.Tensor], factor: float = 1.0) -> None:
    for flat in flats:
        step(optimizer, named, flat, factor)


@every_kind
@pytest.mark.parametrize("head_rate", [None, 0.7])
def test_steps_equal_torchs_own_optimiser(kind: dict[str, Any], head_rate: float | None) -> None:
    ours, theirs = tensors(), tensors()
    walk(make_optimizer(settings(**kind, head_learning_rate=head_rate), ours, LAYOUT), ours, gradients(4), factor=0.5)
    rates = [0.5 * (head_rate or 0.1) if name == "head.weight" else 0.05 for name, _ in theirs]
    groups = [{"params": [tensor], "lr": rate} for (_, tensor), rate in zip(theirs, rates, strict=True)]
    rest = {key: value for key, value in kind.items() if key != "optimizer"}
    reference = (torch.optim.AdamW if kind["optimizer"] == "adamw" else torch.optim.SGD)(groups, lr=0.05, **rest)
    for flat in gradients(4):
        pieces = flat.split([tensor.numel() for _, tensor in theirs])
        for (_, tensor), piece in zip(theirs, pieces, strict=True):
            tensor.grad = piece.view_as(tensor).clone()
        reference.step()
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_a_step_leaves_no_gradient_behind() -> None:
    named = tensors()
    walk(make_optimizer(settings(), named, LAYOUT), named, gradients(1))
    assert all(tensor.grad is None for _, tensor in named)


@every_kind
def test_dumped_state_continues_bit_for_bit_after_a_trip_to_disk(kind: dict[str, Any]) -> None:
    through, broken = tensors(), tensors()
    walk(make_optimizer(settings(**kind), through, LAYOUT), through, gradients(6))
    first = make_optimizer(settings(**kind), broken, LAYOUT)
    walk(first, broken, gradients(6)[:3])
    state = load(save(dump_state(first, broken)))
    second = make_optimizer(settings(**kind), broken, LAYOUT)
    load_state(second, broken, state)
    again = dump_state(second, broken)
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[name], state[name]) for name in state)
    walk(second, broken, gradients(6)[3:])
    for (_, one), (_, other) in zip(through, broken, strict=True):
        assert torch.equal(one, other)


def test_dumped_state_is_a_copy() -> None:
    named = tensors()
    optimizer = make_optimizer(settings(optimizer="adamw"), named, LAYOUT)
    walk(optimizer, named, gradients(1))
    state = dump_state(optimizer, named)
    before = {name: value.copy() for name, value in state.items()}
    walk(optimizer, named, gradients(2))
    assert all(np.array_equal(before[name], state[name]) for name in state)


@given(total=st.integers(1, 500), schedule=st.sampled_from(["constant", "linear", "cosine"]))
def test_a_schedule_starts_at_one_and_falls_towards_zero(total: int, schedule: str) -> None:
    factors = [schedule_factor(schedule, at, total) for at in range(total)]
    assert factors[0] == 1.0
    assert all(0 < factor <= 1 for factor in factors)
    assert factors == sorted(factors, reverse=True)


def test_schedules_have_their_usual_forms() -> None:
    assert [schedule_factor("linear", at, 4) for at in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert schedule_factor("cosine", 1, 4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule_factor("constant", 3, 4) == 1.0


# --- across rounds --------------------------------------------------------------------------------------------------


def two_rounds(site: Bench, *, carried: bool) -> dict[str, Any]:
    first = site.round(1, site.alive())
    state = first.optimizer_state if carried else {}
    return dict(site.round(2, site.whole(first), optimizer_state=state).state)


def test_kept_state_changes_the_next_round_and_reset_state_does_not_exist(bench: MakeBench) -> None:
    keep = bench().plan_with(training__optimizer="adamw", training__optimizer_state="keep")
    assert any(
        not np.array_equal(one, other)
        for one, other in zip(
            two_rounds(keep, carried=True).values(), two_rounds(keep, carried=False).values(), strict=True
        )
    )
    reset = keep.plan_with(training__optimizer_state="reset")
    assert reset.round().optimizer_state == {}


def test_the_kept_state_names_every_trained_tensor_and_no_other(bench: MakeBench) -> None:
    keep = bench().plan_with(
        training__optimizer="adamw", training__optimizer_state="keep", aggregation__algorithm="ffa"
    )
    named = {name.rsplit("/", 1)[0] for name in keep.round().optimizer_state}
    assert named == set(keep.layouts[0].names)


def test_the_schedule_runs_over_the_rounds_of_the_plan(bench: MakeBench) -> None:
    """Round 2 of 2 of a linear schedule moves half as far as round 1 would under the same noise."""
    site = bench().plan_with(privacy__mode="off", privacy__sampling_rate=1.0, training__local_steps=1)
    start = site.alive()

    def moved(schedule: str, number: int) -> float:
        result = site.plan_with(training__schedule=schedule).round(number, start)
        return float(np.sqrt(sum(np.square(result.state[name] - start[name]).sum() for name in result.state)))

    assert moved("linear", 1) == pytest.approx(moved("constant", 1), rel=1e-5)
    assert moved("linear", 2) == pytest.approx(moved("constant", 1) / 2, rel=1e-4)
