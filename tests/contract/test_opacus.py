"""What fedtune relies on in Opacus and dp-accounting beyond their documented surface; a failure names what moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.grad_sample import GradSampleHooks
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def hooked() -> Iterator[tuple[nn.Sequential, GradSampleHooks]]:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    hooks = GradSampleHooks(model, loss_reduction="sum", strict=True)
    yield model, hooks
    hooks.cleanup()


def backward(model: nn.Module, records: int = 4) -> None:
    model(torch.randn(records, 3, requires_grad=True)).sum().backward()


def test_hooks_attach_without_wrapping_and_mark_the_model(hooked: tuple[nn.Sequential, GradSampleHooks]) -> None:
    model, _ = hooked
    assert type(model) is nn.Sequential
    assert hasattr(model, "autograd_grad_sample_hooks")


def test_per_record_gradients_stand_on_the_parameter_with_records_first(
    hooked: tuple[nn.Sequential, GradSampleHooks],
) -> None:
    model, _ = hooked
    backward(model)
    for tensor in model.parameters():
        assert tensor.grad_sample.shape == (4, *tensor.shape)
        assert torch.allclose(tensor.grad_sample.sum(0), tensor.grad, atol=1e-6)


def test_the_state_that_the_engine_resets_is_where_it_expects(hooked: tuple[nn.Sequential, GradSampleHooks]) -> None:
    model, _ = hooked
    model(torch.randn(4, 3))
    assert all(len(layer.activations) == 1 for layer in (model[0], model[2]))
    assert all(tensor._forward_counter == 1 for tensor in model.parameters())
    assert "grad_sample" in vars(model[0].weight)
    assert "_forward_counter" in vars(model[0].weight)


def test_disabled_hooks_record_nothing(hooked: tuple[nn.Sequential, GradSampleHooks]) -> None:
    model, hooks = hooked
    hooks.disable_hooks()
    backward(model)
    assert all(tensor.grad_sample is None for tensor in model.parameters())
    assert not hasattr(model[0], "activations")


def test_evaluation_mode_is_not_recorded_which_is_why_the_engine_sets_it(
    hooked: tuple[nn.Sequential, GradSampleHooks],
) -> None:
    model, _ = hooked
    model.eval()
    model(torch.randn(4, 3))
    assert not hasattr(model[0], "activations")


def test_cleanup_leaves_nothing(hooked: tuple[nn.Sequential, GradSampleHooks]) -> None:
    model, hooks = hooked
    hooks.cleanup()
    assert not hasattr(model, "autograd_grad_sample_hooks")
    assert not any(hasattr(tensor, "grad_sample") for tensor in model.parameters())


def test_the_rules_are_a_mapping_by_exact_layer_type() -> None:
    assert nn.Linear in GradSampleHooks.GRAD_SAMPLERS
    assert nn.LayerNorm in GradSampleHooks.GRAD_SAMPLERS
    assert nn.Module not in GradSampleHooks.GRAD_SAMPLERS


def test_a_flattened_batch_goes_unnoticed_which_is_why_the_engine_checks(
    hooked: tuple[nn.Sequential, GradSampleHooks],
) -> None:
    model, _ = hooked
    model(torch.randn(2, 5, 3).reshape(-1, 3)).reshape(2, 5).sum().backward()
    assert len(model[0].weight.grad_sample) == 10


def test_a_shared_input_is_booked_on_the_first_record_which_is_why_the_engine_checks(
    hooked: tuple[nn.Sequential, GradSampleHooks],
) -> None:
    layer = hooked[0][0]
    (layer(torch.zeros(4, 3)) + layer(torch.ones(1, 3))).sum().backward()
    weights = layer.weight.grad_sample.abs().sum((1, 2))
    assert weights[0] > 0
    assert weights[1:].sum() == 0


@pytest.mark.parametrize("accountant", [PRVAccountant, RDPAccountant])
def test_opacus_accountants_take_a_history_of_sigma_rate_steps(accountant: Any) -> None:
    judge = accountant()
    judge.history = [(1.0, 0.01, 1000)]
    assert 1.8 < judge.get_epsilon(1e-5) < 2.2


def test_opacus_prv_reports_the_upper_end_of_its_interval() -> None:
    judge = PRVAccountant()
    judge.history = [(1.0, 0.01, 1000)]
    assert judge.get_epsilon(1e-5) == pytest.approx(judge.get_epsilon(1e-5, eps_error=0.001) + 0.009, abs=1e-3)


def test_dp_accounting_composes_and_inverts_the_gaussian() -> None:
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0)), 9
    )
    pld = PLDAccountant(value_discretization_interval=1e-3).compose(event).get_epsilon(1e-5)
    assert 0 < pld <= RdpAccountant(orders=(2, 4, 8, 16)).compose(event).get_epsilon(1e-5)
    sigma = dp_accounting.get_sigma_gaussian(1.0, 1e-5)
    assert dp_accounting.get_epsilon_gaussian(sigma, 1e-5) == pytest.approx(1.0, abs=1e-6)
