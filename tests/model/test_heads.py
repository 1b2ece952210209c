"""The pooled head: a normalised mean over real tokens, a bounded gradient, and a start that reads no record."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune.model.heads import PooledClassifier, start_from_names


class Lookup(nn.Module):
    """A backbone whose hidden states are rows of a table."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6, dtype=dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def classifier(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> PooledClassifier:
    made = PooledClassifier(Lookup(dtype), 6, 3, scale)
    nn.init.normal_(made.head.weight)
    return made


IDS, MASK = torch.tensor([[1, 2, 3], [4, 5, 8]]), torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize("filler", [0, 7, 8])
def test_padding_does_not_reach_the_embedding(filler: int) -> None:
    made = classifier()
    padded = torch.cat([IDS, torch.full((2, 4), filler)], 1)
    mask = torch.cat([MASK, torch.zeros(2, 4, dtype=torch.int64)], 1)
    assert torch.equal(made.embed(padded, mask), made.embed(IDS, MASK))


def test_the_embedding_is_the_normalised_mean_of_the_real_tokens() -> None:
    made = classifier()
    mean = made.backbone.table.weight[[4, 5]].mean(0)
    found = made.embed(IDS, MASK)
    assert torch.allclose(found[1], mean / mean.norm())
    assert torch.allclose(found.norm(dim=1), torch.ones(2))


def test_a_record_without_tokens_has_no_embedding_and_finite_gradients() -> None:
    made = classifier()
    logits = made(IDS, torch.tensor([[0, 0, 0], [1, 1, 1]]))
    assert torch.equal(logits[0], torch.zeros(3))
    logits.sum().backward()
    assert made.backbone.table.weight.grad.isfinite().all()


def test_a_bfloat16_backbone_is_pooled_in_float32() -> None:
    made = classifier(torch.bfloat16)
    assert made(IDS, MASK).dtype == torch.float32
    assert torch.allclose(made.embed(IDS, MASK).norm(dim=1), torch.ones(2), atol=1e-6)


def test_the_scale_multiplies_the_logits() -> None:
    plain, scaled = classifier(), classifier(scale=7.0)
    scaled.load_state_dict(plain.state_dict())
    assert torch.allclose(scaled(IDS, MASK), 7.0 * plain(IDS, MASK))


def test_a_records_head_gradient_is_bounded_by_its_error() -> None:
    """‖∂loss/∂W‖ = scale · ‖softmax − onehot‖ · ‖e‖ ≤ scale · √2, whatever the backbone says."""
    made = classifier(scale=2.0)
    with torch.no_grad():
        made.backbone.table.weight.mul_(1e4)
    nn.functional.cross_entropy(made(IDS[:1], MASK[:1]), torch.tensor([2])).backward()
    assert float(made.head.weight.grad.norm()) <= 2.0 * 2**0.5 * (1 + 1e-5)


# --- label names ----------------------------------------------------------------------------------------------------


def test_a_centred_embedding_has_no_common_part_and_length_one() -> None:
    made = classifier()
    plain, mean = made.embed(IDS, MASK), torch.full((6,), 0.3)
    made.centre = mean
    moved = plain - mean
    assert torch.allclose(made.embed(IDS, MASK), moved / moved.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(("centre", "rows"), [(True, True), (True, False), (False, True)])
def test_names_give_the_centre_and_the_rows_that_are_asked_for(*, centre: bool, rows: bool) -> None:
    made, names = classifier(), nn.functional.normalize(torch.randn(3, 6))
    before = made.head.weight.detach().clone()
    start_from_names(made, names, centre=centre, rows=rows)
    assert (made.centre is not None) == centre
    assert torch.equal(made.head.weight, before) != rows
    if rows:
        assert torch.allclose(made.head.weight.norm(dim=1), torch.ones(3))


def test_a_text_that_is_a_label_name_is_classified_as_it_from_the_start() -> None:
    made = classifier()
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    start_from_names(made, made.embed(ids, torch.ones_like(ids)).detach(), centre=True, rows=True)
    assert made(ids, torch.ones_like(ids)).argmax(1).tolist() == [0, 1, 2]


def test_one_name_alone_leaves_finite_numbers() -> None:
    made = PooledClassifier(Lookup(), 6, 1, 1.0)
    start_from_names(made, torch.ones(1, 6), centre=True, rows=True)
    assert made(IDS, MASK).isfinite().all()
