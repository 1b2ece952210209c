"""Per-record gradients against an independent loop, and what the engine refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Never

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedtune.errors import PrivacyError
from fedtune.privacy.engines import OpacusEngine, summed_gradient

if TYPE_CHECKING:
    from collections.abc import Callable


def one_by_one(case: Any) -> torch.Tensor:
    """Each record alone, by plain autograd."""
    tensors = [tensor for _, tensor in case.parameters]
    rows = []
    for record in range(case.records):
        gradients = torch.autograd.grad(case.losses(case.rows(record)).sum(), tensors, allow_unused=True)
        pairs = zip(gradients, tensors, strict=True)
        rows.append(torch.cat([(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in pairs]))
    return torch.stack(rows)


def linear_losses(model: nn.Module, inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(inputs).flatten(1).square().sum(1)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_gradients_equal_a_loop_over_single_records_in_float64(tiny: Callable[..., Any], name: str, rank: int) -> None:
    case = tiny(name, rank)
    expected = one_by_one(case)
    found = case.gradients(case.batch)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    assert expected.norm(dim=1)[:3].min() > 0


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_float32_gradients_equal_the_float64_loop_within_its_precision(tiny: Callable[..., Any], name: str) -> None:
    case = tiny(name)
    expected = one_by_one(case)
    case.model.float()
    found = case.gradients(case.batch)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_the_padding_of_the_other_records_does_not_change_a_gradient(tiny: Callable[..., Any]) -> None:
    case = tiny("llama", lengths=(3, 9))
    short = {name: tensor[:1, :3] for name, tensor in case.batch.items()}
    assert torch.allclose(case.gradients(short)[0], case.gradients(case.batch)[0], rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was_found(tiny: Callable[..., Any]) -> None:
    case = tiny("gpt2")
    before = {name: set(vars(module)) for name, module in case.model.named_modules()}
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    case.model.eval()
    case.gradients(case.batch)
    assert {name: set(vars(module)) for name, module in case.model.named_modules()} == before
    assert all(torch.equal(state[name], tensor) for name, tensor in case.model.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in case.model.modules())
    assert all(tensor.grad is None and not hasattr(tensor, "grad_sample") for tensor in case.model.parameters())


def test_evaluation_mode_gives_the_same_gradients(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")
    training = case.gradients(case.batch)
    case.model.eval()
    assert torch.equal(case.gradients(case.batch), training)


def test_an_empty_batch_never_runs_the_forward_pass(tiny: Callable[..., Any]) -> None:
    case = tiny("bert")

    def fail() -> Never:
        raise AssertionError("the forward pass ran")

    size = sum(tensor.numel() for _, tensor in case.parameters)
    with OpacusEngine(case.model, case.parameters) as engine:
        assert engine.per_sample_gradients(fail, 0).shape == (0, size)
    assert torch.equal(summed_gradient(case.parameters, fail, 0), torch.zeros(size, dtype=torch.float64))


def test_the_sum_without_privacy_is_the_sum_of_the_rows(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")
    found = summed_gradient(case.parameters, lambda: case.losses(case.batch), case.records)
    assert torch.allclose(found, case.gradients(case.batch).sum(0), rtol=1e-9, atol=1e-12)


def test_a_parameter_that_takes_no_part_has_zero_rows() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])
    with OpacusEngine(model, named(model)) as engine:
        rows = engine.per_sample_gradients(linear_losses(model[0], torch.randn(4, 2)), 4)
    assert rows.shape == (4, 15)
    assert rows[:, :6].abs().sum() > 0
    assert rows[:, 6:].abs().sum() == 0


def test_an_interrupted_pass_does_not_leak_into_the_next(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")

    def interrupted() -> Never:
        case.losses(case.rows(0, 1))
        raise KeyboardInterrupt

    with OpacusEngine(case.model, case.parameters) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.per_sample_gradients(interrupted, 2)
        again = engine.per_sample_gradients(lambda: case.losses(case.batch), case.records)
    assert torch.equal(again, case.gradients(case.batch))


def test_a_forward_pass_outside_the_engine_is_not_recorded(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")
    with OpacusEngine(case.model, case.parameters) as engine:
        case.losses(case.rows(0)).sum().backward()
        case.model.zero_grad()
        found = engine.per_sample_gradients(lambda: case.losses(case.batch), case.records)
    assert torch.equal(found, case.gradients(case.batch))


def test_a_batch_loss_is_refused(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")
    with (
        OpacusEngine(case.model, case.parameters) as engine,
        pytest.raises(PrivacyError, match=r"privacy\.coupled-records"),
    ):
        engine.per_sample_gradients(lambda: case.losses(case.batch).mean(), case.records)


class Flattening(nn.Module):
    """A layer in the way of OPT's feed-forward block: tokens are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc1(inputs.reshape(-1, 3)).reshape(inputs.shape)


@pytest.mark.parametrize("records", [1, 4])
def test_a_layer_that_flattens_tokens_into_the_batch_is_refused_by_name(records: int) -> None:
    model = nn.Sequential(Flattening())
    with (
        OpacusEngine(model, named(model)) as engine,
        pytest.raises(PrivacyError, match=r"0\.fc1 sees .*flattens tokens.*flattened-records"),
    ):
        engine.per_sample_gradients(linear_losses(model, torch.randn(records, 5, 3)), records)


class SharedInput(nn.Module):
    """A layer in the way of DeBERTa's: used on the records and on one embedding that all of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.key(inputs) + self.key(torch.ones(1, 3))
        return result


def test_a_layer_shared_by_all_records_is_refused_by_name() -> None:
    """Opacus would book the shared part of all records on the first, which moves the sum by up to 2 C."""
    model = nn.Sequential(SharedInput())
    with (
        OpacusEngine(model, named(model)) as engine,
        pytest.raises(PrivacyError, match=r"0\.key sees 1 rows for 4 records"),
    ):
        engine.per_sample_gradients(linear_losses(model, torch.randn(4, 3)), 4)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, inputs, use_reentrant=False)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.inner.weight)


@pytest.mark.parametrize("model", [Checkpointed(), Functional()])
def test_a_layer_that_opacus_misses_is_an_error_and_not_a_zero(model: nn.Module) -> None:
    with (
        OpacusEngine(model, named(model)) as engine,
        pytest.raises(PrivacyError, match="inner"),
    ):
        engine.per_sample_gradients(linear_losses(model, torch.randn(2, 3)), 2)


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.scale


def test_a_layer_without_a_rule_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), OwnParameter())
    with pytest.raises(PrivacyError, match=r"layer 1 \(OwnParameter\).*unsupported-layer"):
        OpacusEngine(model, named(model))


def test_a_trainable_parameter_that_is_not_listed_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(PrivacyError, match=r"1\.weight.*unlisted"):
        OpacusEngine(model, named(model)[:2])


def test_a_frozen_parameter_cannot_be_listed() -> None:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    with pytest.raises(PrivacyError, match="bias"):
        OpacusEngine(model, list(model.named_parameters()))


def test_a_parameter_of_another_model_cannot_be_listed() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(PrivacyError, match="alien"):
        OpacusEngine(model, [*named(model), ("alien", nn.Parameter(torch.ones(1)))])


def test_two_engines_on_one_model_are_refused() -> None:
    model = nn.Linear(3, 3)
    with OpacusEngine(model, named(model)), pytest.raises(PrivacyError, match="engine-open"):
        OpacusEngine(model, named(model))


def test_a_layer_used_twice_sums_both_uses() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    inputs = torch.randn(4, 3, dtype=torch.float64)
    with OpacusEngine(model, named(model)) as engine:
        rows = engine.per_sample_gradients(lambda: model(model(inputs)).square().sum(1), 4)
    for record, row in zip(inputs, rows, strict=True):
        alone = torch.autograd.grad(model(model(record[None])).square().sum(), list(model.parameters()))
        assert torch.allclose(row, torch.cat([part.flatten() for part in alone]), rtol=1e-12)
