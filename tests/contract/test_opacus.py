"""What fedtune relies on in Opacus and dp-accounting beyond their documented surface; a failure names what moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.data_loader import DPDataLoader
from opacus.grad_sample import AbstractGradSampleHooks, GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchSplittingSampler
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


# What the grad-sample mode of our own stands on.


def poisson_loader(records: int = 8, batch_size: int = 2, **options: Any) -> DPDataLoader:
    loader = DataLoader(TensorDataset(torch.arange(float(records))[:, None]), batch_size=batch_size)
    return DPDataLoader.from_data_loader(loader, **options)


class Watched(PrivacyEngine):
    """Writes down what `make_private` hands to the methods that may be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, set[str]] = {}

    def _prepare_model(self, module: nn.Module, **options: Any) -> Any:
        self.calls["model"] = set(options)
        return super()._prepare_model(module, **options)

    def _prepare_data_loader(self, data_loader: Any, **options: Any) -> Any:
        self.calls["data_loader"] = set(options)
        return super()._prepare_data_loader(data_loader, **options)

    def _prepare_optimizer(self, **options: Any) -> Any:
        self.calls["optimizer"] = set(options)
        return super()._prepare_optimizer(**options)


@pytest.mark.filterwarnings("ignore")
def test_make_private_prepares_the_model_then_the_loader_then_the_optimizer() -> None:
    engine, model = Watched(), nn.Linear(1, 1)
    engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.ones(4, 1))),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        wrap_model=False,
    )
    assert list(engine.calls) == ["model", "data_loader", "optimizer"]
    assert engine.calls["model"] >= {"grad_sample_mode", "batch_first", "loss_reduction", "wrap_model"}
    assert engine.calls["data_loader"] >= {"poisson_sampling", "rand_on_empty"}
    assert engine.calls["optimizer"] >= {
        "optimizer", "noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction", "noise_generator",
        "clipping", "grad_sample_mode", "distributed",
    }  # fmt: skip


def test_secure_mode_needs_a_package_that_cannot_be_installed_which_is_why_ours_is_set_afterwards() -> None:
    with pytest.raises(ImportError, match="torchcsprng"):
        PrivacyEngine(secure_mode=True)
    assert PrivacyEngine().secure_rng is None


class Steps(DPOptimizer):
    """Writes down what a step is made of."""

    grad_samples = (torch.zeros(1, 1),)
    accumulated_iterations = 1

    def clip_and_accumulate(self) -> None:
        self.calls = ["clip"]

    def add_noise(self) -> None:
        self.calls.append("noise")

    def scale_grad(self) -> None:
        self.calls.append("scale")


def test_a_step_clips_and_then_adds_noise_unless_it_was_told_to_wait() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer = Steps(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1)
    optimizer.attach_step_hook(lambda this: this.calls.append("hook"))
    optimizer.signal_skip_step(do_skip=True)
    optimizer.step()
    assert (optimizer.calls, optimizer._is_last_step_skipped) == (["clip"], True)
    optimizer.step()
    assert (optimizer.calls, optimizer._is_last_step_skipped) == (["clip", "noise", "scale", "hook"], False)


def test_the_sum_of_opacus_optimizer_outlives_cleanup_which_is_why_ours_removes_it() -> None:
    class Hooks(AbstractGradSampleHooks):
        def remove_hooks(self) -> None:
            self.removed = True

    model = nn.Linear(1, 1)
    hooks = Hooks(model)
    DPOptimizer(torch.optim.SGD(model.parameters()), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1)
    assert set(vars(model.weight)) == {"grad_sample", "_forward_counter", "summed_grad"}
    hooks.cleanup()
    assert hooks.removed
    assert set(vars(model.weight)) == {"summed_grad"}


def test_a_poisson_loader_takes_another_sampler_of_the_same_length() -> None:
    loader = poisson_loader()
    sampler = loader.batch_sampler
    assert type(sampler) is UniformWithReplacementSampler
    assert (sampler.num_samples, sampler.sample_rate, sampler.steps, sampler.generator) == (8, 1 / 4, 4, None)
    with pytest.raises(ValueError, match="batch_sampler"):
        loader.batch_sampler = [[0, 1], []]
    vars(loader)["batch_sampler"] = [[0, 1], []]
    assert [len(batch[0]) for batch in loader] == [2, 0]


def test_the_length_of_a_split_loader_knows_samplers_that_derive_from_the_poisson_one() -> None:
    class Derived(UniformWithReplacementSampler):
        pass

    sampler = Derived(num_samples=8, sample_rate=0.5)
    assert len(BatchSplittingSampler(sampler=sampler, max_batch_size=1, optimizer=None)) == 8


def test_a_loader_learns_the_shape_of_an_empty_batch_from_the_first_it_collates() -> None:
    """Otherwise an empty first batch is a list, whatever the collate function makes."""
    records = [{"tokens": torch.ones(3)}] * 4
    loader = DPDataLoader.from_data_loader(DataLoader(records))
    loader.collate_fn([records[0]])
    assert loader.collate_fn([])["tokens"].shape == (0, 3)


def test_rand_on_empty_makes_a_record_up_which_is_why_it_is_refused() -> None:
    loader = poisson_loader(rand_on_empty=True)
    loader.collate_fn([loader.dataset[0]])
    assert len(loader.collate_fn([])[0]) == 1
