"""One loss per record, from that record alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedtune.errors import DataError, PrivacyError
from fedtune.privacy.losses import record_losses


def test_classification_is_the_cross_entropy_of_each_record() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    found = record_losses("classification", logits, torch.tensor([1, 0]))
    assert found.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-2))])


def test_causal_lm_is_the_mean_over_the_records_own_trained_tokens() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    found = record_losses("causal-lm", logits, labels)
    for record, first in ((0, 3), (1, 1)):
        tokens = [-logits[record, t - 1].log_softmax(-1)[labels[record, t]].item() for t in range(first, 5)]
        assert found[record].item() == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)


def test_a_record_without_trained_tokens_has_zero_loss_and_zero_gradient() -> None:
    logits = torch.randn(2, 4, 7, requires_grad=True)
    labels = torch.randint(0, 7, (2, 4))
    labels[0] = -100
    losses = record_losses("causal-lm", logits, labels)
    losses.sum().backward()
    assert losses[0] == 0
    assert logits.grad[0].abs().sum() == 0
    assert logits.grad[1].abs().sum() > 0


def test_the_first_token_is_never_predicted() -> None:
    labels = torch.tensor([[3, -100, -100]])
    assert record_losses("causal-lm", torch.randn(1, 3, 7), labels).item() == 0


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_the_other_records_do_not_change_a_loss(kind: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, 7) if kind == "causal-lm" else torch.randn(6, 7)
    labels = torch.randint(0, 7, logits.shape[:-1])
    whole = record_losses(kind, logits, labels)
    alone = torch.cat([record_losses(kind, logits[i : i + 1], labels[i : i + 1]) for i in range(6)])
    assert torch.allclose(whole, alone, rtol=1e-6)


def test_bfloat16_logits_are_computed_in_float32_and_float64_stays() -> None:
    logits, labels = torch.randn(3, 7).bfloat16(), torch.tensor([0, 1, 2])
    assert torch.equal(
        record_losses("classification", logits, labels), record_losses("classification", logits.float(), labels)
    )
    assert record_losses("classification", logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_outside_the_head_is_an_error(label: int) -> None:
    with pytest.raises(DataError, match="label-range"):
        record_losses("classification", torch.randn(1, 7), torch.tensor([label]))
    with pytest.raises(DataError, match="label-range"):
        record_losses("causal-lm", torch.randn(1, 2, 7), torch.tensor([[0, label]]))


def test_labels_of_another_shape_are_an_error() -> None:
    with pytest.raises(DataError, match="label-shape"):
        record_losses("causal-lm", torch.randn(2, 3, 7), torch.zeros(2, 4, dtype=torch.long))


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(PrivacyError, match="unknown-task"):
        record_losses("regression", torch.randn(1, 2), torch.zeros(1))
