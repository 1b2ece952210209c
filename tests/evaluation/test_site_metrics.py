"""What leaves a site: bounded in every unit, as noisy as the plan says, or rounded, and the sites' means add up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.tasks import Task
from fedtune.data.units import Units
from fedtune.errors import PrivacyError
from fedtune.evaluation.metrics import Confusion, Tally
from fedtune.evaluation.site_metrics import UnitMeans, UnitScores, coarse_means, noisy_means, ranges, together
from fedtune.privacy.plan import public_count
from fedtune.privacy.random import SecureSource, SeededSource

CLASSES = Task("classification", {"text": "text", "label": "label"}, ("a", "b", "c"))
TEXTS = Task("text", {"text": "text"})
anything = st.floats(width=64, allow_nan=True, allow_infinity=True)
losses = st.one_of(anything, st.sampled_from([0.0, 1e300, math.inf, math.nan]))
records = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), losses, st.integers(0, 4)), min_size=1, max_size=25)


def scores(task: Task, found: list[tuple[float, float, int]]) -> UnitScores:
    numbers = np.array([pair[:2] for pair in found], np.float64)
    units = Units.grouped(np.array([unit for _, _, unit in found], np.int64))
    return UnitScores.of(numbers if task is CLASSES else numbers[:, 1:], units, task)


def uniform_scores(units: int, seed: int = 0, task: Task = CLASSES) -> UnitScores:
    largest = ranges(task)
    return UnitScores(np.random.default_rng(seed).uniform(size=(units, len(largest))) * largest, largest)


@pytest.mark.parametrize("task", [CLASSES, TEXTS])
@given(found=records)
def test_no_unit_moves_the_sum_by_more_than_its_stated_sensitivity(
    task: Task, found: list[tuple[float, float, int]]
) -> None:
    whole = scores(task, found).centred_sum()
    for unit in {unit for _, _, unit in found}:
        others = [record for record in found if record[2] != unit]
        without = scores(task, others).centred_sum().total if others else whole.total * 0
        assert float((whole.total - without).norm()) <= whole.sensitivity == 1.0
    assert whole.dropped == 0


@pytest.mark.parametrize("task", [CLASSES, TEXTS])
def test_some_unit_does_move_it_by_nearly_that_much(task: Task) -> None:
    worst = scores(task, [(0.0, 1e9, 0)] * 30).centred_sum()
    assert float(worst.total.norm()) == pytest.approx(1, abs=1e-5)


@given(found=records)
def test_a_unit_scores_the_mean_of_its_bounded_records(found: list[tuple[float, float, int]]) -> None:
    got, cap = scores(CLASSES, found), 2 * math.log(3)
    for at, unit in enumerate(sorted({unit for _, _, unit in found})):
        own = [record for record in found if record[2] == unit]
        loss = math.fsum(cap if math.isnan(loss) else min(max(loss, 0), cap) for _, loss, _ in own) / len(own)
        expected = [math.fsum(right for right, _, _ in own) / len(own), loss]
        np.testing.assert_allclose(got.values[at], expected, rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("task", [CLASSES, TEXTS])
def test_without_noise_the_means_are_those_of_a_float64_loop(task: Task) -> None:
    found = uniform_scores(480, task=task)
    got = noisy_means(found, 1e-9, SeededSource("test"))
    for number, mean in enumerate(got.means):
        centred = math.fsum(float(row[number]) / found.ranges[number] - 0.5 for row in found.values)
        expected = (0.5 + centred / public_count(480)) * found.ranges[number]
        assert mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("task", [CLASSES, TEXTS])
@pytest.mark.parametrize("source", [SeededSource("noise"), SecureSource()])
def test_the_noise_is_as_large_as_the_release_says(task: Task, source: Any) -> None:
    found = uniform_scores(60, task=task)
    releases = [noisy_means(found, 3.0, source) for _ in range(4000)]
    drawn = np.array([release.means for release in releases])
    stated = np.array(releases[0].noise)
    np.testing.assert_allclose(stated / found.ranges, 3.0 * math.sqrt(len(stated)) / 2 / 60)
    np.testing.assert_allclose(drawn.std(axis=0), stated, rtol=0.06)
    np.testing.assert_allclose(drawn.mean(axis=0), found.values.mean(axis=0), atol=5 * stated.max() / math.sqrt(4000))


def test_a_site_without_units_sends_noise_all_the_same() -> None:
    empty = UnitScores.of(np.zeros((0, 2)), Units.each_record(0), CLASSES)
    first, second = (noisy_means(empty, 1.0, SecureSource()) for _ in range(2))
    assert first.units == 1
    assert first.means != second.means


def test_numbers_of_other_records_than_the_units_are_refused() -> None:
    with pytest.raises(PrivacyError) as caught:
        UnitScores.of(np.zeros((1, 2)), Units.each_record(3), CLASSES)
    assert caught.value.code == "privacy.units"


def test_noise_never_shows_an_impossible_metric() -> None:
    assert UnitMeans((1.2, -0.1), 10, (0.3, 0.2)).metrics() == {
        "accuracy": 1.0,
        "loss": 0.0,
        "accuracy_noise": 0.3,
        "loss_noise": 0.2,
    }
    assert UnitMeans((-0.4,), 10, (0.5,)).metrics() == {"loss": 0.0, "perplexity": 1.0, "loss_noise": 0.5}


@given(units=st.integers(0, 400), seed=st.integers(0, 100), task=st.sampled_from([CLASSES, TEXTS]))
def test_rounded_means_are_near_and_one_unit_moves_them_by_one_step_at_most(units: int, seed: int, task: Task) -> None:
    found = uniform_scores(units + 1, seed, task)
    fewer = UnitScores(found.values[:-1], found.ranges)
    coarse, before = coarse_means(found), coarse_means(fewer)
    if units + 1 < 10:
        assert (coarse.units, coarse.metrics()) == (0, {})
        return
    assert coarse.units == public_count(units + 1)
    step = 0.01 if units + 1 >= 100 else 0.1
    shares = np.array(coarse.means) / found.ranges
    np.testing.assert_allclose(shares, np.round(shares / step) * step, atol=1e-12)
    assert np.all(np.abs(shares - found.values.mean(axis=0) / found.ranges) <= step / 2 + 1e-12)
    if units not in {9, 99}:  # where a finer step begins
        moved = (np.array(coarse.means) - np.array(before.means)) / found.ranges
        assert np.all(np.abs(moved) <= step + 1e-12)


def test_a_rounded_release_holds_no_confusion_and_no_exact_count() -> None:
    found = coarse_means(uniform_scores(1234))
    assert {name: array.shape for name, array in found.to_arrays().items()} == {"means": (2,), "units": (1,)}
    assert found.units == 1200


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 4), st.integers(1, 1000)), min_size=1, max_size=6))
def test_sites_means_add_up_to_those_of_all_units(sites: list[tuple[float, float, int]]) -> None:
    parts = [UnitMeans((right, loss), units, (1 / units, 2 / units)) for right, loss, units in sites]
    whole, units = together(parts), sum(units for _, _, units in sites)
    assert isinstance(whole, UnitMeans)
    assert whole.units == units
    expected = [sum(site[at] * site[2] for site in sites) / units for at in (0, 1)]
    np.testing.assert_allclose(whole.means, expected, rtol=1e-12, atol=1e-300)
    # Independent noise of standard deviation 1 in each site's sum.
    np.testing.assert_allclose(whole.noise, np.array([1.0, 2.0]) * math.sqrt(len(sites)) / units)
    assert together(parts[::-1]) == whole


def test_a_site_that_sends_nothing_leaves_the_rest_alone() -> None:
    some, none = UnitMeans((0.5, 1.0), 20, (0.0, 0.0)), UnitMeans((0.0, 0.0), 0, (0.0, 0.0))
    assert together([none, some, none]).metrics() == some.metrics()
    assert together([none]).metrics() == together([]).metrics() == {}


def test_tallies_add_up_as_before() -> None:
    tally = Tally(3.0, 2, 0, Confusion.of([0, 1], [0, 0], 3))
    assert together([tally, tally]).metrics() == (tally + tally).metrics()
