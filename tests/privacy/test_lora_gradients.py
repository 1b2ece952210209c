"""The LoRA engine against plain autograd on single unpadded records, over what it is used with.

Errors are relative, of all columns together and of each tensor alone. No factor is zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import geometric_mean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedtune.model.checkpointing import checkpointable, checkpointed
from fedtune.model.dropout import SourcedDropout
from fedtune.privacy.engines import open_engine
from fedtune.privacy.random import SeededSource
from fedtune.privacy.units import unit_rows
from tests.support.adapted import (
    DECODERS,
    FAMILIES,
    Case,
    autograd_row,
    by_tensor,
    make_case,
    relative_error,
    rows_of,
    worst_error,
)

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

RANKS, TARGETS = (1, 2, 8, 64), ("auto", "all-linear")
EXACT, SINGLE = 1e-10, 1e-5


def heads(family: str) -> tuple[str, ...]:
    return ("none", "architecture", "pooled") if family in DECODERS else ("architecture", "pooled")


def matrix() -> list[Any]:
    """Every family with every rank, both targets and every head it can have."""
    found = []
    for family in FAMILIES:
        for at, (rank, targets) in enumerate((rank, targets) for rank in RANKS for targets in TARGETS):
            head = heads(family)[(at // 2 + at) % len(heads(family))]
            found.append(pytest.param(family, rank, targets, head, id=f"{family}-{rank}-{targets}-{head}"))
    return found


@pytest.mark.parametrize(("family", "rank", "targets", "head"), matrix())
def test_gradients_equal_the_loop_in_float64_and_float32_and_opacus(
    family: str, rank: int, targets: str, head: str
) -> None:
    case = make_case(family, rank, targets=targets, head=head)
    expected = case.loop()
    error = partial(worst_error, case.model)
    assert all(bool(block.any()) for block in by_tensor(case.model, expected).values())
    assert error(case.gradients(case.batch), expected) <= EXACT
    assert error(case.gradients(case.batch), case.gradients(case.batch, "opacus")) <= EXACT
    case.model.float()
    single = case.gradients(case.batch)
    assert single.dtype == torch.float32
    assert error(single, expected) <= SINGLE
    assert error(single, case.gradients(case.batch, "opacus")) <= SINGLE


def test_every_layer_of_the_matrix_has_the_rule_it_should() -> None:
    case = make_case("bert", head="architecture")
    with open_engine("lora", case.model, case.parameters) as engine:
        rules = engine.rules
    factors = {name.rsplit(".lora_", 1)[0] for name, _ in case.parameters if "lora_" in name}
    assert {name for name, rule in rules.items() if rule == "fused LoRA"} == factors
    assert {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in set(rules) - factors} == {
        "dense",  # of the pooler
        "classifier",
    }
    assert set(rules.values()) == {"fused LoRA", "linear"}


@settings(max_examples=60)
@given(data=st.data())
def test_gradients_equal_the_loop_whatever_the_combination(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=5))
    case = make_case(
        family,
        data.draw(st.integers(1, 20)),
        lengths=lengths,
        targets=data.draw(st.sampled_from(TARGETS)),
        head=data.draw(st.sampled_from(heads(family))),
        seed=data.draw(st.integers(0, 99)),
    )
    freeze(case, *data.draw(st.lists(st.sampled_from([name for name, _ in case.parameters]), max_size=4)))
    found, expected = case.gradients(case.batch), case.loop()
    # A tensor of a one-token record can have a gradient that is zero but for rounding.
    assert relative_error(found, expected) <= EXACT
    assert float((found - expected).abs().max()) <= EXACT * max(1.0, float(expected.abs().max()))


# --- what changes the computation -----------------------------------------------------------------------------------


def freeze(case: Case, *names: str) -> None:
    """Freeze parameters by name, but for the last that is left."""
    for name in names:
        if len(case.parameters) > 1:
            case.model.get_parameter(name).requires_grad_(False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deberta"])
def test_any_attention_gives_the_loops_gradients(family: str, attention: str) -> None:
    case = make_case(family, attention=attention)
    assert case.model.config._attn_implementation == attention
    assert worst_error(case.model, case.gradients(case.batch), case.loop()) <= EXACT


@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_factor_has_no_columns_and_changes_no_other(family: str, role: str) -> None:
    case = make_case(family)
    both = by_tensor(case.model, case.gradients(case.batch))
    freeze(case, *[name for name, _ in case.parameters if role in name])
    found = by_tensor(case.model, case.gradients(case.batch))
    assert found.keys() == {name for name in both if role not in name}
    assert all(relative_error(found[name], both[name]) <= EXACT for name in found)
    assert worst_error(case.model, case.gradients(case.batch), case.loop()) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_bit(family: str) -> None:
    case = make_case(family, dtype=torch.float32)
    expected = case.gradients(case.batch)
    layers = checkpointable(case.model)

    def losses() -> Tensor:
        with checkpointed(layers):
            return case.losses(case.batch)

    assert len(layers) == 2
    assert torch.equal(rows_of("lora", case.model, losses, case.records), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_physical_batches_make_the_rows_of_the_logical_one(family: str) -> None:
    case = make_case(family, lengths=(7, 2, 5, 1, 6))
    parts = [case.gradients(case.rows(*part)) for part in ((3,), (1, 2), (0, 4))]
    assert worst_error(case.model, torch.cat(parts), case.loop()[[3, 1, 2, 0, 4]]) <= EXACT


def test_rows_summed_over_units_are_the_gradients_of_the_units_losses() -> None:
    case, units = make_case("llama", lengths=(7, 2, 5, 3, 6)), np.array([4, 4, 1, 1, 1])
    with open_engine("lora", case.model, case.parameters) as engine:
        batches = (  # lazily: every batch overwrites the rows of the one before
            engine.per_sample_gradients(lambda part=part: case.losses(case.rows(*part)), len(part))
            for part in ((0, 1, 2), (3, 4))
        )
        found = [engine.arrange(row) for rows in unit_rows(batches, [units[:3], units[3:]]) for row in rows]
    expected = [autograd_row(case.model, case.losses(case.rows(*unit)).sum()) for unit in ((0, 1), (2, 3, 4))]
    assert worst_error(case.model, torch.stack(found), torch.stack(expected)) <= EXACT


def test_a_tied_embedding_that_is_trained_sums_both_of_its_uses() -> None:
    case = make_case("gpt2", head="none")
    embedding = case.model.get_input_embeddings().weight
    assert embedding is case.model.get_output_embeddings().weight
    embedding.requires_grad_(True)
    assert worst_error(case.model, case.gradients(case.batch), case.loop()) <= EXACT


# --- bfloat16 -------------------------------------------------------------------------------------------------------


def in_bfloat16(case: Case, how: str) -> Case:
    """A bfloat16 base under float32 factors, as PEFT makes it, or float32 tensors under autocast."""
    if how == "autocast":
        case.precision.append(torch.bfloat16)
        return case
    for tensor in case.model.parameters():
        tensor.data = tensor.data if tensor.requires_grad else tensor.data.bfloat16()
    return case


def errors(case: Case, rows: Tensor, expected: Tensor) -> list[float]:
    """Relative errors: of all columns, then of each tensor."""
    blocks = zip(by_tensor(case.model, rows).values(), by_tensor(case.model, expected).values(), strict=True)
    return [relative_error(rows, expected), *(relative_error(*pair) for pair in blocks)]


@pytest.mark.parametrize("how", ["base", "autocast"])
def test_in_bfloat16_rows_are_float32_and_as_near_the_truth_as_pefts(how: str) -> None:
    """The truth is the float64 loop on the same rounded weights, and PEFT's rows are autograd's in the same type.

    Which of two roundings is nearer is a matter of luck in one model: single ratios reach from 0.5 to 2. Over eighteen
    models the geometric mean says whether one is worse, for all columns together and for single tensors. The bounds of
    10 % and 30 % are absolute.
    """
    overall, single = [], []
    for family in FAMILIES:
        for seed in range(3):
            head = heads(family)[0 if family in DECODERS else 1]  # no head is trained in bfloat16
            case = in_bfloat16(make_case(family, 4, torch.float32, head=head, seed=seed), how)
            expected = Case(case.kind, copy.deepcopy(case.model).double(), case.batch).loop()
            losses = case.losses(case.batch)
            peft = errors(case, torch.stack([autograd_row(case.model, loss, keep=True) for loss in losses]), expected)
            rows = case.gradients(case.batch)
            ours = errors(case, rows, expected)
            assert rows.dtype == torch.float32
            assert ours[0] <= 0.1
            assert max(ours) <= 0.3
            overall.append(ours[0] / peft[0])
            single += [our / their for our, their in zip(ours[1:], peft[1:], strict=True)]
    assert geometric_mean(overall) <= 1.5
    assert geometric_mean(single) <= 1.5


# --- dropout --------------------------------------------------------------------------------------------------------


@contextmanager
def masked(model: nn.Module, source: SeededSource) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, SourcedDropout)]
    assert layers
    for layer in layers:
        layer.source = source
    yield
    for layer in layers:
        layer.source = None


@pytest.mark.parametrize("family", FAMILIES)
def test_with_dropout_gradients_are_those_of_the_mask_that_was_drawn(family: str) -> None:
    case = make_case(family, dropout=0.4)
    with masked(case.model, SeededSource("masks")):
        losses = case.losses(case.batch)
        expected = torch.stack([autograd_row(case.model, loss, keep=True) for loss in losses])
    with masked(case.model, SeededSource("masks")):
        assert worst_error(case.model, case.gradients(case.batch), expected) <= EXACT
    assert relative_error(case.gradients(case.batch), expected) > 0.1  # and without a mask they are others


def test_every_pass_draws_a_fresh_mask_for_every_record() -> None:
    case = make_case("llama", lengths=(5, 5), dropout=0.4)
    for tensor in case.batch.values():
        tensor[1] = tensor[0]
    with masked(case.model, SeededSource("masks")):
        first, second = case.gradients(case.batch), case.gradients(case.batch)
    assert relative_error(first[0], first[1]) > 0.01
    assert relative_error(first, second) > 0.01


def test_checkpointing_computes_again_with_the_same_mask() -> None:
    case = make_case("llama", dropout=0.4)
    layers = checkpointable(case.model)

    def losses() -> Tensor:
        with checkpointed(layers):
            return case.losses(case.batch)

    with masked(case.model, SeededSource("masks")):
        expected = case.gradients(case.batch)
    with masked(case.model, SeededSource("masks")):
        assert torch.equal(rows_of("lora", case.model, losses, case.records), expected)


# --- the store of rows ----------------------------------------------------------------------------------------------


def test_rows_may_be_overwritten_and_batches_may_grow_and_shrink() -> None:
    """Whatever stands in the buffer, NaN above all, is never read."""
    case = make_case("gpt2", lengths=(7, 2, 5, 1, 4, 6))
    expected = case.loop()
    with open_engine("lora", case.model, case.parameters) as engine:
        for part in ((0, 1), (2,), (3, 4, 5, 0), (1, 2, 3), (0, 1, 2, 3, 4, 5)):
            losses: Callable[[], Tensor] = partial(lambda rows: case.losses(case.rows(*rows)), part)
            rows = engine.per_sample_gradients(losses, len(part))
            found = torch.stack([engine.arrange(row) for row in rows])
            assert worst_error(case.model, found, expected[list(part)]) <= EXACT
            rows.fill_(torch.nan)


def test_a_tensor_that_takes_no_part_is_zero_also_where_the_buffer_held_something_else() -> None:
    case = make_case("llama")
    with open_engine("lora", case.model, case.parameters) as engine:
        engine.per_sample_gradients(lambda: case.losses(case.batch), case.records).fill_(torch.nan)
        rows = engine.per_sample_gradients(lambda: torch.zeros(2), 2)
    assert rows.shape == (2, sum(tensor.numel() for _, tensor in case.parameters))
    assert not rows.any()
