"""The traps that public engines fall into: each attack succeeds on the control and fails here.

An attack measures by how much one record moves the clipped sum; clipping promises at most C.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn

from fedtune.data.sampling import PoissonSampler, physical_batches
from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import Event, epsilon
from fedtune.privacy.clipping import ClippedSum, clip_and_sum
from fedtune.privacy.noise import add_noise
from fedtune.privacy.opacus_engine import OpacusEngine
from fedtune.privacy.random import RandomSource, SeededSource

Step = Callable[[torch.Tensor, RandomSource], torch.Tensor]

C = 1e-2
WITHIN = C * (1 + 1e-6)


def moved(sum_of: Callable[[Any], torch.Tensor], with_record: Any, without: Any) -> float:
    """By how much one record moves a sum."""
    return float(torch.linalg.vector_norm((sum_of(with_record) - sum_of(without)).double()))


def naive_opacus_rows(model: nn.Module, loss: Callable[[], torch.Tensor], reduction: str) -> torch.Tensor:
    """What Opacus' hooks alone give, without any of our checks."""
    hooks = GradSampleHooks(model, loss_reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss().backward()
    rows = [t.grad_sample.flatten(1) for t in model.parameters() if getattr(t, "grad_sample", None) is not None]
    hooks.cleanup()
    model.zero_grad()
    return torch.cat(rows, 1)


def naive_clip(rows: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return (rows * (C / norms).clamp(max=1)[:, None]).sum(0)


# --- a loss that couples records ------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tiny: Callable[..., Any]) -> Any:
    """Eight times the same short record and a long one that outnumbers their tokens; with and without the long one."""
    case = tiny("llama", lengths=(2, 2, 2, 2, 2, 2, 2, 2, 14))
    for tensor in case.batch.values():
        tensor[:8] = tensor[0]
    return case, case.batch, case.rows(*range(8))


def test_one_record_moves_the_clipped_sum_by_at_most_the_clip_norm(uneven: Any) -> None:
    case, batch, neighbour = uneven
    for clip_norm in (C, float(case.gradients(neighbour)[0].norm())):
        sums = [clip_and_sum(case.gradients(rows), clip_norm).total for rows in (batch, neighbour)]
        assert float((sums[0] - sums[1]).norm()) <= clip_norm * (1 + 1e-6)


def test_control_one_record_moves_it_several_times_further_under_the_batch_mean_loss(uneven: Any) -> None:
    case, batch, neighbour = uneven

    def gradients(rows: torch.Tensor) -> torch.Tensor:
        return naive_opacus_rows(case.model, lambda: case.model(**rows).loss, "mean")

    clip_norm = float(gradients(neighbour)[0].norm())
    assert moved(lambda rows: clip_and_sum(gradients(rows), clip_norm).total, batch, neighbour) > 3 * clip_norm


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("lengths", [(1, 1), (14, 1, 1, 1), (3, 3, 3), (1, 14)])
def test_no_record_of_an_adversarial_batch_moves_the_sum_by_more(
    tiny: Callable[..., Any], name: str, lengths: Any
) -> None:
    case = tiny(name, lengths=lengths)
    case.batch["labels"][-1] = 0  # one record repeats another's label, and in a language model trains on every position
    for left_out in range(case.records):
        neighbour = case.rows(*[i for i in range(case.records) if i != left_out])
        assert moved(lambda rows: clip_and_sum(case.gradients(rows), C).total, case.batch, neighbour) <= WITHIN


def test_records_with_ignored_labels_contribute_nothing(tiny: Callable[..., Any]) -> None:
    case = tiny("gpt2", lengths=(4, 4))
    case.batch["labels"][1] = -100
    assert case.gradients(case.batch)[1].abs().sum() == 0


# --- a norm computed in bf16 ----------------------------------------------------------------------------------------


def bf16_rows() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(64, 5000).bfloat16()


def test_no_bfloat16_row_contributes_more_than_the_clip_norm() -> None:
    assert max(float(clip_and_sum(row[None], C).total.norm()) for row in bf16_rows()) <= C


def test_control_norms_in_bfloat16_let_rows_contribute_more() -> None:
    rows = bf16_rows()
    assert max(float(naive_clip(row[None], row[None].norm(dim=1)).double().norm()) for row in rows) > 1.002 * C


# --- a NaN record ---------------------------------------------------------------------------------------------------


def test_a_nan_record_contributes_zero_and_is_counted(tiny: Callable[..., Any]) -> None:
    case = tiny("bert")
    clean = case.gradients(case.batch)
    overflow = torch.tensor([1.0, math.nan, 1.0, 1.0])
    with OpacusEngine(case.model, case.parameters) as engine:
        rows = engine.per_sample_gradients(lambda: case.losses(case.batch) * overflow, 4)
    result = clip_and_sum(rows, C)
    assert result.dropped == 1
    assert torch.allclose(result.total, clip_and_sum(clean[[0, 2, 3]], C).total, rtol=1e-9)


def test_control_a_nan_record_poisons_a_plain_clipped_sum(tiny: Callable[..., Any]) -> None:
    case = tiny("bert")
    rows = case.gradients(case.batch)
    rows[1] = math.nan
    assert naive_clip(rows, rows.norm(dim=1)).isnan().all()


# --- tokens flattened into the batch --------------------------------------------------------------------------------


class Flattening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fc1(inputs.reshape(-1, 4)).reshape(inputs.shape)


def test_control_flattened_tokens_are_each_clipped_as_a_record() -> None:
    torch.manual_seed(0)
    model, inputs = Flattening(), torch.randn(1, 1, 4).expand(1, 9, 4).contiguous()
    rows = naive_opacus_rows(model, lambda: model(inputs).sum(), "sum")
    assert len(rows) == 9
    assert float(clip_and_sum(rows, C).total.norm()) > 8 * C


def test_flattened_tokens_are_refused() -> None:
    model, inputs = Flattening(), torch.randn(1, 9, 4)
    with (
        OpacusEngine(model, list(model.named_parameters())) as engine,
        pytest.raises(PrivacyError, match="flattened-records"),
    ):
        engine.per_sample_gradients(lambda: model(inputs).sum((1, 2)), 1)


# --- an empty Poisson batch -----------------------------------------------------------------------------------------


def test_an_empty_batch_skips_the_model_and_is_still_noised_and_accounted(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")
    with OpacusEngine(case.model, case.parameters) as engine:
        rows = engine.per_sample_gradients(lambda: pytest.fail("the model ran"), 0)
    step = add_noise(clip_and_sum(rows, C), 1.0, SeededSource("empty"), expected_batch=2.0)
    assert float(step.mean.std()) == pytest.approx(C / 2, rel=0.2)
    assert epsilon([Event(1.0, 0.1, 1, C)], 1e-5) > 0


# --- an ε of a rate that did not run --------------------------------------------------------------------------------


def test_shuffled_epochs_are_accounted_as_if_nothing_were_sampled() -> None:
    shuffled = epsilon([Event(1.0, 0.01, 1000, C, sampler="shuffle")], 1e-5)
    assert shuffled >= epsilon([Event(1.0, 1.0, 10, C)], 1e-5) * (1 - 1e-3)


def test_control_as_poisson_they_would_seem_ten_times_as_private() -> None:
    poisson, unamplified = epsilon([Event(1.0, 0.01, 1000, C)], 1e-5), epsilon([Event(1.0, 1.0, 10, C)], 1e-5)
    assert (poisson, unamplified) == (pytest.approx(1.83, abs=0.01), pytest.approx(17.86, abs=0.01))


# --- a logical batch that does not fit into memory -------------------------------------------------------------------


def test_a_logical_batch_in_pieces_counts_every_record_once() -> None:
    torch.manual_seed(0)
    rows, drawn = torch.randn(40, 7), PoissonSampler(40, 0.5).draw(SeededSource("pieces"))
    lengths = torch.randint(1, 30, (40,)).numpy()
    parts = ClippedSum.zero(7, C)
    for piece in physical_batches(drawn, lengths, 3):
        parts = parts + clip_and_sum(rows[torch.from_numpy(piece)], C)
    assert parts.records == len(drawn)
    assert torch.allclose(parts.total, clip_and_sum(rows[torch.from_numpy(drawn)], C).total, rtol=1e-10)
