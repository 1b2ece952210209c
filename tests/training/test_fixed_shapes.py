"""A round whose batches have fixed shapes: the same training, and no coupling of records by their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.data.templates import Example
from tests.support.bench import Bench, make_bench
from tests.support.reference_round import distance
from tests.support.round_checks import sum_before_the_noise

C = 1e-2
COPIES = 40
COARSE = {"model__dtype": "bfloat16", "model__attention": "sdpa"}


def site(folder: Path, head: str, **keys: Any) -> Bench:
    """A site whose every record is drawn, and clipped as it surely is."""
    architecture = "llama" if head == "none" else "bert"
    terms = {"privacy__clip_norm": C, "training__sampling_rate": 1.0, "training__local_steps": 1}
    return make_bench(folder, architecture, head, **{**terms, "training__physical_batch": 64, **keys})


def one_long_among_copies(bench: Bench, copies: int = COPIES) -> Sequence[Example]:
    """The same short record many times, whose rounding adds up, and the longest there is."""
    by_length = sorted(bench.examples, key=lambda example: len(example.input_ids))
    short = by_length[0]
    cut = {name: getattr(short, name)[:6] for name in ("input_ids", "labels") if getattr(short, name) is not None}
    if "labels" in cut:
        cut["labels"] = cut["input_ids"].copy()
    return [*(replace(short, length=6, **cut) for _ in range(copies)), by_length[-1]]


def moved_by_the_long_one(bench: Bench) -> float:
    everyone = one_long_among_copies(bench)
    sums = [sum_before_the_noise(replace(bench, examples=few)) for few in (everyone, everyone[:-1])]
    return float((sums[0] - sums[1]).norm())


@pytest.mark.parametrize("head", ["pooled", "none"])
@pytest.mark.parametrize("keys", [COARSE, {"model__dtype": "bfloat16"}, {"training__autocast": "bfloat16"}, {}])
def test_the_longest_record_moves_the_sum_by_at_most_the_clip_norm(tmp_path: Path, head: str, keys: Any) -> None:
    bench = site(tmp_path, head, training__batch_shapes="fixed", **keys)
    assert moved_by_the_long_one(bench) <= C * (1 + 1e-6)


def test_control_in_tight_batches_it_moves_the_sum_further(tmp_path: Path) -> None:
    """The copies are padded to the long record, or are not; attention in bfloat16 rounds them otherwise."""
    bench = site(tmp_path, "none", training__batch_shapes="tight", **COARSE)
    assert moved_by_the_long_one(bench) > 1.01 * C


@pytest.mark.parametrize("head", ["pooled", "architecture", "none"])
def test_a_round_in_fixed_shapes_equals_the_plain_reference(tmp_path: Path, head: str) -> None:
    architecture = "bert" if head == "pooled" else "llama"
    assert distance(make_bench(tmp_path, architecture, head, training__batch_shapes="fixed")) < 1e-5


def test_a_record_rounds_alike_wherever_it_stands(tmp_path: Path) -> None:
    """Removing a record moves the others up: their rows must not know."""
    bench = site(tmp_path, "pooled", training__batch_shapes="fixed", model__dtype="bfloat16")
    whole = sum_before_the_noise(bench)
    for left_out in range(0, len(bench.examples), 5):
        others = [*bench.examples[:left_out], *bench.examples[left_out + 1 :]]
        assert float((whole - sum_before_the_noise(replace(bench, examples=others))).norm()) <= C * (1 + 1e-6)


def test_units_of_several_records_are_clipped_as_one_in_fixed_shapes(tmp_path: Path) -> None:
    keys = {"privacy__unit": "patient_id", "privacy__max_records_per_unit": 3}
    assert distance(make_bench(tmp_path, training__batch_shapes="fixed", **keys)) < 1e-5


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, False),
        ({"privacy__noise": "secure"}, True),
        ({"model__dtype": "bfloat16"}, True),
        ({"training__autocast": "bfloat16"}, True),
        ({"privacy__noise": "secure", "training__batch_shapes": "tight"}, False),
        ({"training__batch_shapes": "fixed"}, True),
        ({"training__batch_shapes": "fixed", "privacy__mode": "off"}, False),
    ],
)
def test_shapes_are_fixed_where_it_matters(tmp_path: Path, keys: Any, expected: bool) -> None:
    assert make_bench(tmp_path, **keys).plan.has_fixed_shapes is expected
