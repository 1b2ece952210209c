"""The records of a pass, and what goes past them: refused here, and silent with Opacus' hooks (the controls)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedtune.errors import PrivacyError
from fedtune.privacy.opacus_hooks import LoraGradSampleHooks
from fedtune.privacy.opacus_mode import PrivacyEngine
from tests.support.adapted import autograd_row, make_training_case

pytestmark = pytest.mark.filterwarnings("ignore")
Tiny = Callable[..., Any]
C = 1.0


@pytest.fixture
def tiny() -> Tiny:
    return make_training_case


class Folding(nn.Module):
    """Only its trained layer folds tokens into the batch, as OPT's feed-forward block does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner(x.reshape(-1, 3)).reshape(x.shape)


class Plain(Folding):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result


class Bypassing(Folding):
    """Uses a weight without calling its layer."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner(x) + nn.functional.linear(x, self.inner.weight)


def private(model: nn.Module, records: int = 4, **options: Any) -> tuple[LoraGradSampleHooks, Any, DataLoader[Any]]:
    made: tuple[Any, Any, Any] = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(torch.randn(records, 5, 3)), batch_size=records),
        max_grad_norm=C,
        **{"noise_multiplier": 0.0, "grad_sample_mode": "lora", "wrap_model": False, **options},
    )
    return made


@pytest.mark.parametrize("records", [1, 4])
def test_a_layer_that_folds_tokens_into_the_batch_is_refused_though_it_is_the_only_one(records: int) -> None:
    model = Folding()
    private(model)
    with pytest.raises(PrivacyError, match=rf"inner sees {5 * records} rows for {records} records"):
        model(torch.randn(records, 5, 3))


def test_opacus_hooks_take_each_folded_token_for_a_record() -> None:
    model = Folding()
    hooks = GradSampleHooks(model, loss_reduction="mean")
    model(torch.randn(4, 5, 3)).flatten(1).sum(1).mean().backward()
    assert len(model.inner.weight.grad_sample) == 20
    hooks.cleanup()


def test_folding_tokens_before_the_call_is_caught_by_what_the_loader_drew() -> None:
    model = Plain()
    _, optimizer, loader = private(model)
    for (batch,) in loader:
        model(batch.reshape(-1, 3)).sum(1).mean().backward()
        with pytest.raises(PrivacyError, match=r"drew 4 records .* called with 20"):
            optimizer.step()
        optimizer.step()
        assert optimizer.last_sum.records == 0


def test_leaving_a_drawn_batch_out_is_caught_with_the_next_step() -> None:
    model = Plain()
    _, optimizer, loader = private(model)
    sizes = iter([4, 3])
    loader.batch_sampler.steps = 2
    batches = (batch[: next(sizes)] for (batch,) in loader)
    next(batches)
    model(next(batches)).sum(1).mean().backward()
    with pytest.raises(PrivacyError, match=r"drew 4 records .* with 3"):
        optimizer.step()


def test_a_call_that_does_not_show_its_records_needs_them_said() -> None:
    model = Plain()
    hooks, optimizer, _ = private(model)
    inputs = {"x": torch.randn(4, 5, 3), "mask": torch.ones(1, 5)}
    with pytest.raises(PrivacyError, match=r"\(4, 5, 3\), \(1, 5\).*uncounted-records"):
        model(**inputs)
    with hooks.batch(4):
        model(**inputs).flatten(1).sum(1).mean().backward()
    optimizer.step()
    assert optimizer.last_sum.records == 4


def test_a_number_said_wrongly_is_refused_by_the_layers() -> None:
    model = Plain()
    hooks, _, _ = private(model)
    with hooks.batch(20), pytest.raises(PrivacyError, match="inner sees 4 rows for 20 records"):
        model(torch.randn(4, 5, 3))


def test_a_gradient_that_goes_past_the_layers_is_refused() -> None:
    model = Bypassing()
    _, optimizer, _ = private(model)
    model(torch.randn(4, 5, 3)).flatten(1).sum(1).mean().backward()
    with pytest.raises(PrivacyError, match=r"inner\.weight has a gradient, but not one for each record"):
        optimizer.step()


@pytest.mark.parametrize("way", ["part", "evaluation", "own loss"])
def test_training_beside_the_model_is_refused_and_not_lost(way: str) -> None:
    model = Plain()
    _, optimizer, _ = private(model)
    if way == "evaluation":
        model.eval()(torch.randn(4, 5, 3)).sum().backward()
    elif way == "part":
        model.inner(torch.randn(4, 5, 3)).sum().backward()
    else:
        (model(torch.randn(4, 5, 3)).flatten(1).sum(1).mean() + model.inner.weight.square().sum()).backward()
    with pytest.raises(PrivacyError, match="not one for each record"):
        optimizer.step()


def test_evaluation_between_a_call_and_its_step_records_nothing(tiny: Tiny) -> None:
    case = tiny("llama")
    hooks = LoraGradSampleHooks(case.model, loss_reduction="sum")
    losses = case.losses(case.batch)
    with torch.no_grad():
        case.losses(case.rows(0, 1))
        case.model.eval()
        case.losses(case.rows(0))
    losses.sum().backward()
    rows = hooks.take()
    hooks.cleanup()
    assert len(rows) == case.records
    assert torch.allclose(
        hooks.arrange(rows.sum(0)), autograd_row(case.model, case.losses(case.batch).sum()), rtol=1e-9, atol=1e-12
    )


def test_calls_outside_training_start_no_pass(tiny: Tiny) -> None:
    case = tiny("bert")
    hooks = LoraGradSampleHooks(case.model)
    with torch.no_grad():
        case.losses(case.batch)
    case.model.eval()
    case.losses(case.batch)
    assert all(tensor.grad_sample is None for tensor in hooks.tensors)
    assert hooks.take().shape[0] == 0


@pytest.mark.parametrize("backward", [False, True])
def test_a_second_call_before_the_step_is_refused(backward: bool) -> None:
    model = Plain()
    hooks, _, _ = private(model)
    loss = model(torch.randn(4, 5, 3)).mean()
    if backward:
        loss.backward()
    with pytest.raises(PrivacyError, match="second-call"):
        model(torch.randn(4, 5, 3))
    hooks.discard()
    model(torch.randn(2, 5, 3))


def test_a_step_without_a_backward_pass_is_refused() -> None:
    model = Plain()
    _, optimizer, _ = private(model)
    model(torch.randn(4, 5, 3))
    with pytest.raises(PrivacyError, match="no-backward"):
        optimizer.step()


def test_a_backward_pass_of_a_batch_that_was_given_up_is_refused() -> None:
    model = Plain()
    hooks, _, _ = private(model)
    loss = model(torch.randn(4, 5, 3)).mean()
    hooks.discard()
    with pytest.raises(PrivacyError, match="not-recording"):
        loss.backward()


def test_a_step_on_gradients_that_were_not_cleared_is_refused() -> None:
    model = Plain()
    _, optimizer, _ = private(model)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(4, 5, 3)).mean().backward()
        if optimizer.last_sum is None:
            optimizer.step()
    with pytest.raises(PrivacyError, match="not-cleared"):
        optimizer.step()


def token_mean(case: Any, keep: tuple[int, ...]) -> torch.Tensor:
    return case.model(**case.rows(*keep)).loss


def test_the_loss_of_the_model_itself_is_refused_for_tokens(tiny: Tiny) -> None:
    case = tiny("llama")
    hooks = LoraGradSampleHooks(case.model)
    with pytest.raises(PrivacyError, match="coupled-records"):
        token_mean(case, (0, 1, 2, 3))
    hooks.cleanup()


def test_the_loss_of_the_model_itself_lets_one_record_move_the_others_with_opacus_hooks(tiny: Tiny) -> None:
    """The control: the last record, long, shortens all others' gradients."""
    moved = []
    for loss in (token_mean, lambda case, keep: case.losses(case.rows(*keep)).mean()):
        case = tiny("llama", lengths=(2, 2, 2, 16))
        rows = []
        for keep in ((0, 1, 2), (0, 1, 2, 3)):
            hooks = GradSampleHooks(case.model, loss_reduction="mean")
            loss(case, keep).backward()
            rows.append(torch.cat([t.grad_sample[:3].flatten(1) for _, t in case.parameters], dim=1))
            hooks.cleanup()
        moved.append(float((rows[1] - rows[0]).norm() / rows[0].norm()))
    assert moved[0] > 0.3
    assert moved[1] < 1e-6


def test_labels_of_whole_records_are_taken(tiny: Tiny) -> None:
    """The loss that a classifier returns is a mean over records."""
    case = tiny("bert")
    hooks = LoraGradSampleHooks(case.model)
    case.model(**case.batch).loss.backward()
    rows = hooks.take().clone()
    hooks.cleanup()
    expected = autograd_row(case.model, case.losses(case.batch).sum())
    assert torch.allclose(hooks.arrange(rows.sum(0)), expected, rtol=1e-9, atol=1e-12)


def test_batches_of_any_size_follow_each_other(tiny: Tiny) -> None:
    case, alone = tiny("gpt2"), tiny("gpt2")
    hooks = LoraGradSampleHooks(case.model, loss_reduction="sum")
    for keep in ((0,), (0, 1, 2, 3), (2, 1)):
        case.losses(case.rows(*keep)).sum().backward()
        total = hooks.arrange(hooks.take().sum(0))
        hooks.clear()
        expected = autograd_row(alone.model, alone.losses(alone.rows(*keep)).sum())
        assert torch.allclose(total, expected, rtol=1e-9, atol=1e-12)
