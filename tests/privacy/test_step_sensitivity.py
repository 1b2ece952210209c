"""An attack on a whole step, from tokens through an engine to the clipped sum.

What holds: in physical batches of one shape (records x tokens) a record's row depends on that record alone, to the last
bit and in any precision, so one record more or less moves the clipped sum by at most C(1 + 1e-6). "Less" is a filler in
the record's place, whose loss has weight zero.

What does not: in a batch of another shape the same record's row rounds otherwise, since matrix products and attention
take their sums in another order. That is a coupling by lengths, not by values: without the longest record the others
are padded to less. It vanishes in float64, is below 1e-5 of a row in float32, and near 1e-2 of a row in bfloat16. Equal
records round alike, so a batch of duplicates adds it up: the control with 64 of them shows by how much. In the same way
transformers attends by another kernel in a batch that has no padding at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune.privacy.clipping import ClippingName, clip_and_sum
from fedtune.privacy.engines import EngineName
from fedtune.privacy.units import unit_rows
from tests.support.adapted import UNUSED, Case, make_case, rows_of

# Opacus 1.6 warns of this itself, and says that it does not concern the hooks that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

C = 1e-2
WITHIN = C * (1 + 1e-6)
METHODS: tuple[ClippingName, ...] = get_args(ClippingName)
NAMES = ["bert", "llama", "gpt2", "qwen2"]
PRECISIONS = ["float32", "bfloat16", "autocast"]
# Adversaries: a long record, a one-token one, two equal ones, and four with a weight or a token of their own.
LENGTHS = (14, 1, 5, 5, 6, 4, 3, 9, 7)
HUGE, OVERFLOWING, NAN, POISONED, IGNORED = 4, 5, 6, 7, 8


def prepare(name: str, precision: str, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> Case:
    """A case in one precision; in bfloat16 no head is trained, so an encoder has the pooled one."""
    head = "pooled" if name == "bert" else None
    dtype = torch.float64 if precision == "float64" else torch.float32
    case = make_case(name, dtype=dtype, lengths=lengths, head=head, **options)
    case.batch["weight"] = torch.ones(len(lengths))
    if precision == "autocast":
        case.precision.append(torch.bfloat16)
    for tensor in case.model.parameters():
        if precision == "bfloat16" and not tensor.requires_grad:
            tensor.data = tensor.data.bfloat16()
    return case


def adversarial(name: str, precision: str) -> Case:
    """Very different lengths, duplicates, a loss times 1e10, one that overflows, NaN as a loss and inside, no label."""
    case = prepare(name, precision)
    for tensor in case.batch.values():
        tensor[3] = tensor[2]
    case.batch["weight"][HUGE] = 1e5
    case.batch["weight"][OVERFLOWING] = 3e38
    case.batch["weight"][NAN] = torch.nan
    case.batch["input_ids"][POISONED, 2] = UNUSED
    if case.kind == "causal-lm":
        case.batch["labels"][IGNORED] = -100
    return case


@contextmanager
def poison(model: nn.Module) -> Iterator[None]:
    """Let the embedding of the unused token be NaN."""
    embedding: Any = getattr(model, "backbone", model).get_input_embeddings()
    hook = embedding.register_forward_hook(
        lambda _layer, args, output: output.masked_fill((args[0] == UNUSED)[..., None], torch.nan)
    )
    yield
    hook.remove()


def weighted(case: Case, batch: dict[str, Tensor]) -> Tensor:
    """The weight enters squared, in two steps, so that it overflows on the way back."""
    return case.losses(batch) * batch["weight"] * batch["weight"]


def rows(case: Case, batch: dict[str, Tensor], engine: EngineName) -> Tensor:
    with poison(case.model):
        return rows_of(engine, case.model, lambda: weighted(case, batch), len(batch["labels"]))


def without(batch: dict[str, Tensor], *records: int) -> dict[str, Tensor]:
    """The neighbour of the same shape: fillers in the records' places."""
    fewer = {name: tensor.clone() for name, tensor in batch.items()}
    for record in records:
        fewer["input_ids"][record] = 0
        fewer["input_ids"][record, 0] = 1
        fewer["attention_mask"][record] = (torch.arange(fewer["attention_mask"].shape[1]) == 0).long()
        fewer["weight"][record] = 0.0
        if fewer["labels"].ndim > 1:
            fewer["labels"][record] = -100
    return fewer


def shrunk(batch: dict[str, Tensor], record: int) -> dict[str, Tensor]:
    """The neighbour as it would be drawn: a record less, and no longer than its own longest."""
    keep = [at for at in range(len(batch["labels"])) if at != record]
    width = int(batch["attention_mask"][keep].sum(1).max())
    return {name: tensor[keep][:, :width] if tensor.ndim > 1 else tensor[keep] for name, tensor in batch.items()}


def moved(one: Tensor, other: Tensor, method: ClippingName = "fixed") -> float:
    """By how much two sets of rows differ in their clipped sums."""
    sums = [clip_and_sum(each, C, method).total for each in (one, other)]
    return float((sums[0] - sums[1]).norm())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN is NaN here."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_no_record_moves_the_sum_by_more_than_the_clip_norm(name: str, precision: str, engine: EngineName) -> None:
    case = adversarial(name, precision)
    whole = rows(case, case.batch, engine)
    others = np.arange(case.records)
    for record in range(case.records):
        fewer = rows(case, without(case.batch, record), engine)
        assert same_bits(fewer[others != record], whole[others != record])
        assert not fewer[record].any()
        for method in METHODS:
            assert moved(whole, fewer, method) <= WITHIN


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_adversaries_are_what_they_should_be(name: str, precision: str, engine: EngineName) -> None:
    case = adversarial(name, precision)
    found = rows(case, case.batch, engine)
    lost = [not bool(row.isfinite().all()) for row in found]
    assert [at for at, is_lost in enumerate(lost) if is_lost] == [OVERFLOWING, NAN, POISONED]
    assert 1e8 < float(found[HUGE].norm()) < 1e13
    assert clip_and_sum(found, C).dropped == sum(lost)
    assert torch.equal(found[2], found[3])
    if case.kind == "causal-lm":
        assert not found[[1, IGNORED]].any()  # a single token predicts nothing


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_and_an_empty_one_are_neighbours(name: str, precision: str) -> None:
    case = adversarial(name, precision)
    nothing = rows(case, {key: tensor[:0] for key, tensor in case.batch.items()}, "lora")
    assert nothing.shape[0] == 0
    for record in range(case.records):
        alone = rows(case, {key: tensor[[record]] for key, tensor in case.batch.items()}, "lora")
        assert all(moved(alone, nothing, method) <= WITHIN for method in METHODS)


@pytest.mark.parametrize("scale", [1e12, 1e30])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nor_does_it_where_the_weights_make_every_gradient_huge(precision: str, scale: float) -> None:
    """With B = 0 the output does not see A, and the gradient of B is as large as A."""
    case = prepare("llama", precision)
    for name, tensor in case.parameters:
        tensor.data *= scale if "lora_A" in name else 0.0
    whole = rows(case, case.batch, "lora").double()
    assert float(whole[0].norm()) > 1e10
    for record in range(case.records):
        assert moved(whole, rows(case, without(case.batch, record), "lora").double()) <= WITHIN


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_unit_of_several_records_moves_the_sum_by_more(precision: str) -> None:
    case, units = adversarial("llama", precision), np.array([0, 0, 1, 1, 1, 2, 3, 4, 4])

    def by_unit(batch: dict[str, Tensor]) -> Tensor:
        return next(iter(unit_rows([rows(case, batch, "lora")], [units]))).clone()

    whole = by_unit(case.batch)
    assert len(whole) == 5
    for unit in range(5):
        fewer = by_unit(without(case.batch, *np.flatnonzero(units == unit).tolist()))
        assert moved(whole, fewer) <= WITHIN


# --- neighbours of another shape ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_in_another_shape_nothing_but_rounding_changes(name: str, engine: EngineName) -> None:
    """In float64 it is too small to matter, so no value of one record reaches another's row."""
    case = adversarial(name, "float64")
    whole = rows(case, case.batch, engine)
    for record in range(case.records):
        assert moved(whole, rows(case, shrunk(case.batch, record), engine)) <= WITHIN


@pytest.mark.parametrize("name", NAMES)
def test_in_another_shape_a_float32_row_changes_by_its_rounding(name: str, engine: EngineName) -> None:
    """So a step of B records in varying shapes has sensitivity C(1 + 1e-6 + 1e-5·B) at the very worst."""
    case = prepare(name, "float32")
    whole = rows(case, case.batch, engine)
    for record in range(case.records):
        others = whole[[at for at in range(case.records) if at != record]]
        differences = (rows(case, shrunk(case.batch, record), engine) - others).norm(dim=1)
        assert bool((differences <= 1e-5 * others.norm(dim=1)).all())


def duplicates(name: str, precision: str, seed: int) -> Case:
    """A long record and 64 equal short ones."""
    case = prepare(name, precision, (16, *(5,) * 64), seed=seed)
    for tensor in case.batch.values():
        tensor[1:] = tensor[1]
    return case


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_in_one_shape_duplicates_do_not_add_up_their_rounding(name: str, precision: str) -> None:
    case = duplicates(name, precision, 0)
    assert moved(rows(case, case.batch, "lora"), rows(case, without(case.batch, 0), "lora")) <= WITHIN


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_control_in_another_shape_bfloat16_duplicates_move_together(precision: str) -> None:
    """The longest record's length alone, through the padding of the others, moves the sum by more than its gradient."""
    moves = []
    for name in NAMES:
        for seed in range(3):
            case = duplicates(name, precision, seed)
            moves.append(moved(rows(case, case.batch, "lora"), rows(case, shrunk(case.batch, 0), "lora")))
    assert max(moves) > 1.01 * C


# --- the control ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_control_the_mean_over_the_batch_moves_the_sum_several_times_further(name: str) -> None:
    """What `model(labels=…)` returns: the same attack, the same shapes."""
    case = prepare(name, "float64", (14, *(2,) * 8))
    for tensor in case.batch.values():
        tensor[1:] = tensor[1]

    def shares(batch: dict[str, Tensor]) -> Tensor:
        """Each record's share in the batch's loss, times the records, as Opacus' `mean` has it."""
        tokens = (batch["labels"][:, 1:] != -100).sum(1)
        found = case.losses(batch) * tokens / tokens.sum()
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        assert torch.allclose(found.sum().float(), case.model(**inputs).loss.float(), rtol=1e-4)
        return found * len(tokens)

    def clipped(batch: dict[str, Tensor]) -> Tensor:
        found = rows_of("lora", case.model, lambda: shares(batch), case.records)
        return clip_and_sum(found, float(short)).total

    short = rows_of("lora", case.model, lambda: shares(without(case.batch, 0)), case.records)[1].norm()
    assert float((clipped(case.batch) - clipped(without(case.batch, 0))).norm()) > 3 * float(short)
