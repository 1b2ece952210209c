"""Measuring an adapter: the tally is that of the logits, and a batch's size or order does not change it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedtune.data.batches import collate
from fedtune.training.evaluate import batches, evaluate
from tests.support.bench import Bench

MakeBench = Callable[..., Bench]


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("llama", "none"), ("gpt2", "architecture")])
def test_the_tally_is_the_sum_over_single_records(bench: MakeBench, architecture: str, head: str, size: int) -> None:
    site: Bench = bench(architecture, head)
    adapter = site.alive()
    found = evaluate(site.workspace, adapter, site.examples, size).metrics()
    one_by_one = [evaluate(site.workspace, adapter, [example], 1) for example in site.examples]
    expected = sum(one_by_one[1:], one_by_one[0]).metrics()
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name], rel=1e-5) for name in found)


def test_accuracy_is_the_share_of_largest_logits(bench: MakeBench) -> None:
    site: Bench = bench()
    site.workspace.load(site.alive())
    with torch.no_grad():
        logits = site.workspace.logits(collate(site.examples, site.workspace.pad_id, "classification"))
    right = np.mean([int(row.argmax()) == example.target for row, example in zip(logits, site.examples, strict=True)])
    found = evaluate(site.workspace, site.alive(), site.examples, 5).metrics()
    assert found["accuracy"] == pytest.approx(right)


def test_every_example_is_in_one_batch(bench: MakeBench) -> None:
    site: Bench = bench()
    positions = [at for group, _ in batches(site.workspace, site.examples, 5) for at in group]
    assert sorted(positions) == list(range(len(site.examples)))


def test_tensors_that_an_adapter_does_not_name_are_at_the_start_of_the_study(bench: MakeBench) -> None:
    """What was in the model before must not leak into a measurement, as A of `ffa` would."""
    site: Bench = bench()
    part = {name: value for name, value in site.alive().items() if "lora_A" not in name}
    fresh = evaluate(site.workspace, part, site.examples, 8)
    site.workspace.load(site.alive(seed=5))
    assert evaluate(site.workspace, part, site.examples, 8).metrics() == fresh.metrics()


def test_no_examples_give_an_empty_tally(bench: MakeBench) -> None:
    site: Bench = bench()
    assert evaluate(site.workspace, site.alive(), [], 8).records == 0
