"""What holds for any per-record engine: against an independent loop, and what is refused; then what is Opacus' own.

The full matrix of models, ranks, targets and precisions is in test_lora_gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedtune.errors import PrivacyError
from fedtune.privacy.engines import EngineName, open_engine, summed_gradient
from tests.support.adapted import named, rows_of, worst_error

# Opacus 1.6 warns of this itself, and says that it does not concern the hooks that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

NAMES = ["bert", "llama", "gpt2"]
Tiny = Callable[..., Any]


def linear_losses(model: nn.Module, inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(inputs).flatten(1).square().sum(1)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_a_loop_over_single_records_in_float64(
    tiny: Tiny, engine: EngineName, name: str, rank: int
) -> None:
    case = tiny(name, rank)
    expected = case.loop()
    assert worst_error(case.model, case.gradients(case.batch, engine), expected) <= 1e-10
    assert expected.norm(dim=1)[:3].min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_float32_gradients_equal_the_float64_loop_within_its_precision(
    tiny: Tiny, engine: EngineName, name: str
) -> None:
    case = tiny(name)
    expected = case.loop()
    case.model.float()
    found = case.gradients(case.batch, engine)
    assert found.dtype == torch.float32
    assert worst_error(case.model, found, expected) <= 1e-5


def test_the_padding_of_the_other_records_does_not_change_a_gradient(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("llama", lengths=(3, 9))
    alone, among_others = case.gradients(case.alone(0), engine)[0], case.gradients(case.batch, engine)[0]
    assert torch.allclose(alone, among_others, rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was_found(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("gpt2")
    case.model.eval()
    before = {name: set(vars(module)) for name, module in case.model.named_modules()}
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    case.gradients(case.batch, engine)
    assert {name: set(vars(module)) for name, module in case.model.named_modules()} == before
    assert all(torch.equal(state[name], tensor) for name, tensor in case.model.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in case.model.modules())
    assert all(tensor.grad is None and not hasattr(tensor, "grad_sample") for tensor in case.model.parameters())


def test_evaluation_mode_gives_the_same_gradients(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("llama")
    training = case.gradients(case.batch, engine)
    case.model.eval()
    assert torch.equal(case.gradients(case.batch, engine), training)


def test_an_empty_batch_never_runs_the_forward_pass(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("bert")

    def fail() -> Never:
        raise AssertionError("the forward pass ran")

    size = sum(tensor.numel() for _, tensor in case.parameters)
    with open_engine(engine, case.model, case.parameters) as opened:
        assert opened.per_sample_gradients(fail, 0).shape == (0, size)
    assert torch.equal(summed_gradient(case.parameters, fail, 0), torch.zeros(size, dtype=torch.float64))


def test_the_sum_without_privacy_is_the_sum_of_the_rows(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("llama")
    found = summed_gradient(case.parameters, lambda: case.losses(case.batch), case.records)
    assert torch.allclose(found, case.gradients(case.batch, engine).sum(0), rtol=1e-9, atol=1e-12)


def test_a_sum_of_rows_is_arranged_like_its_rows(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("gpt2")
    with open_engine(engine, case.model, case.parameters) as opened:
        rows = opened.per_sample_gradients(lambda: case.losses(case.batch), case.records)
        total = opened.arrange(rows.sum(0))
    assert torch.allclose(total, case.loop().sum(0), rtol=1e-9, atol=1e-12)


def test_a_parameter_that_takes_no_part_has_zero_rows(engine: EngineName) -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])
    rows = rows_of(engine, model, linear_losses(model[0], torch.randn(4, 2)), 4)
    assert rows.shape == (4, 15)
    assert rows[:, :6].abs().sum() > 0
    assert rows[:, 6:].abs().sum() == 0


def test_losses_that_depend_on_no_parameter_have_zero_rows(tiny: Tiny) -> None:
    case = tiny("llama")
    assert not rows_of("lora", case.model, lambda: case.losses(case.batch).detach(), case.records).any()


def test_an_interrupted_pass_does_not_leak_into_the_next(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("llama")

    def interrupted() -> Never:
        case.losses(case.rows(0, 1))
        raise KeyboardInterrupt

    with open_engine(engine, case.model, case.parameters) as opened:
        with pytest.raises(KeyboardInterrupt):
            opened.per_sample_gradients(interrupted, 2)
        rows = opened.per_sample_gradients(lambda: case.losses(case.batch), case.records)
        again = torch.stack([opened.arrange(row) for row in rows])
    assert torch.equal(again, case.gradients(case.batch, engine))


def test_a_pass_interrupted_on_its_way_back_does_not_leak_into_the_next(tiny: Tiny, engine: EngineName) -> None:
    """The later layers have then written their rows, the earlier ones have not."""
    case = tiny("llama")

    def failing() -> torch.Tensor:
        hidden: list[torch.Tensor] = []
        layer = case.model.base_model.model.model.layers[1]
        hook = layer.register_forward_pre_hook(lambda _layer, args: hidden.append(args[0]))
        losses: torch.Tensor = case.losses(case.batch)
        hook.remove()
        hidden[0].register_hook(fail)
        return losses

    def fail(_gradient: torch.Tensor) -> Never:
        raise KeyboardInterrupt

    with open_engine(engine, case.model, case.parameters) as opened:
        with pytest.raises(KeyboardInterrupt):
            opened.per_sample_gradients(failing, case.records)
        rows = opened.per_sample_gradients(lambda: case.losses(case.batch), case.records)
        again = torch.stack([opened.arrange(row) for row in rows])
    assert torch.equal(again, case.gradients(case.batch, engine))


def test_a_forward_pass_outside_the_engine_is_not_recorded(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("llama")
    with open_engine(engine, case.model, case.parameters) as opened:
        case.losses(case.rows(0)).sum().backward()
        assert all(tensor.grad is not None for _, tensor in case.parameters)
        case.model.zero_grad()
        rows = opened.per_sample_gradients(lambda: case.losses(case.batch), case.records)
        found = torch.stack([opened.arrange(row) for row in rows])
    assert torch.equal(found, case.gradients(case.batch, engine))


def test_a_batch_loss_is_refused(tiny: Tiny, engine: EngineName) -> None:
    case = tiny("llama")
    with pytest.raises(PrivacyError, match=r"privacy\.coupled-records"):
        rows_of(engine, case.model, lambda: case.losses(case.batch).mean(), case.records)


class Flattening(nn.Module):
    """A layer in the way of OPT's feed-forward block: tokens are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc1(inputs.reshape(-1, 3)).reshape(inputs.shape)


@pytest.mark.parametrize("records", [1, 4])
def test_a_layer_that_flattens_tokens_into_the_batch_is_refused_by_name(engine: EngineName, records: int) -> None:
    model = nn.Sequential(Flattening())
    with pytest.raises(PrivacyError, match=r"0\.fc1 sees .*flattens tokens.*flattened-records"):
        rows_of(engine, model, linear_losses(model, torch.randn(records, 5, 3)), records)


class SharedInput(nn.Module):
    """A layer in the way of DeBERTa's: used on the records and on one embedding that all of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.key(inputs) + self.key(torch.ones(1, 3))
        return result


def test_a_layer_shared_by_all_records_is_refused_by_name(engine: EngineName) -> None:
    """Opacus would book the shared part of all records on the first, which moves the sum by up to 2 C."""
    model = nn.Sequential(SharedInput())
    with pytest.raises(PrivacyError, match=r"0\.key sees 1 rows for 4 records"):
        rows_of(engine, model, linear_losses(model, torch.randn(4, 3)), 4)


class Functional(nn.Module):
    def __init__(self, *, also_as_a_module: bool) -> None:
        super().__init__()
        self.inner, self.also = nn.Linear(3, 3), also_as_a_module

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        used = nn.functional.linear(inputs, self.inner.weight)
        return used + self.inner(inputs) if self.also else used


def test_a_parameter_that_is_used_outside_its_layer_is_an_error_and_not_a_zero(engine: EngineName) -> None:
    model = Functional(also_as_a_module=False)
    with pytest.raises(PrivacyError, match=r"inner.*no-per-record-gradient"):
        rows_of(engine, model, linear_losses(model, torch.randn(2, 3)), 2)


def test_a_parameter_that_is_used_outside_its_layer_as_well_is_an_error() -> None:
    model = Functional(also_as_a_module=True)
    with pytest.raises(PrivacyError, match=r"inner\.weight .*no-per-record-gradient"):
        rows_of("lora", model, linear_losses(model, torch.randn(2, 3)), 2)


def test_a_trainable_parameter_that_is_not_listed_is_refused(engine: EngineName) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(PrivacyError, match=r"1\.weight.*unlisted"):
        open_engine(engine, model, named(model)[:2])


def test_a_frozen_parameter_cannot_be_listed(engine: EngineName) -> None:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    with pytest.raises(PrivacyError, match="bias"):
        open_engine(engine, model, list(model.named_parameters()))


def test_a_parameter_of_another_model_cannot_be_listed(engine: EngineName) -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(PrivacyError, match="alien"):
        open_engine(engine, model, [*named(model), ("alien", nn.Parameter(torch.ones(1)))])


def test_a_parameter_cannot_be_listed_twice(engine: EngineName) -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(PrivacyError, match="twice"):
        open_engine(engine, model, [*named(model), ("again", model.weight)])


def test_a_model_that_trains_nothing_is_refused(engine: EngineName) -> None:
    with pytest.raises(PrivacyError, match="nothing in this model trains"):
        open_engine(engine, nn.Linear(3, 3).requires_grad_(False), [])


@pytest.mark.parametrize("second", ["lora", "opacus"])
def test_two_engines_on_one_model_are_refused_and_the_first_goes_on(engine: EngineName, second: EngineName) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 3), torch.randn(2, 3)
    with open_engine(engine, model, named(model)) as first:
        before = first.per_sample_gradients(linear_losses(model, inputs), 2).clone()
        with pytest.raises(PrivacyError, match="engine-open"):
            open_engine(second, model, named(model))
        assert torch.equal(first.per_sample_gradients(linear_losses(model, inputs), 2), before)
    open_engine(second, model, named(model)).close()


def test_a_layer_used_twice_sums_both_uses(engine: EngineName) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    inputs = torch.randn(4, 3, dtype=torch.float64)
    rows = rows_of(engine, model, lambda: model(model(inputs)).square().sum(1), 4)
    for record, row in zip(inputs, rows, strict=True):
        alone = torch.autograd.grad(model(model(record[None])).square().sum(), list(model.parameters()))
        assert torch.allclose(row, torch.cat([part.flatten() for part in alone]), rtol=1e-12)


# --- what is Opacus' own --------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, inputs, use_reentrant=False)


def test_opacus_misses_what_is_computed_again_which_is_an_error_and_not_a_zero() -> None:
    model = Checkpointed()
    with pytest.raises(PrivacyError, match="inner"):
        rows_of("opacus", model, linear_losses(model, torch.randn(2, 3)), 2)


class OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.scale


def test_a_layer_without_a_rule_of_opacus_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), OwnParameter())
    with pytest.raises(PrivacyError, match=r"layer 1 \(OwnParameter\).*unsupported-layer"):
        open_engine("opacus", model, named(model))
