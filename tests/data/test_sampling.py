"""Poisson sampling, the choice of a unit's records, and the cutting of a logical batch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, kstest

from fedtune.data.sampling import PoissonSampler, choose_records, physical_batches
from fedtune.data.units import Units
from fedtune.errors import PrivacyError
from fedtune.privacy.random import SecureSource, SeededSource


def test_each_unit_is_drawn_at_the_rate_and_independently() -> None:
    sampler, source = PoissonSampler(200, 0.3), SeededSource("sampling")
    drawn = np.zeros((4000, 200))
    for row in drawn:
        row[sampler.draw(source)] = 1
    spread = math.sqrt(0.3 * 0.7 / 4000)
    assert np.abs(drawn.mean(0) - 0.3).max() < 5.5 * spread
    assert np.abs(np.corrcoef(drawn[:, :20].T) - np.eye(20)).max() < 5.5 / math.sqrt(4000)


def test_the_size_of_a_draw_is_binomial() -> None:
    sampler, source = PoissonSampler(1000, 0.05), SeededSource("sizes")
    sizes = np.array([len(sampler.draw(source)) for _ in range(3000)])
    jitter = SeededSource("jitter").uniform(3000)  # makes the discrete distribution continuous
    values = binom.cdf(sizes - 1, 1000, 0.05) + jitter * binom.pmf(sizes, 1000, 0.05)
    assert kstest(values, "uniform").pvalue > 1e-6


def test_rate_one_draws_every_unit() -> None:
    assert PoissonSampler(50, 1.0).draw(SecureSource()).tolist() == list(range(50))


def test_a_draw_may_be_empty() -> None:
    sampler, source = PoissonSampler(2, 0.01), SeededSource("empty")
    assert min(len(sampler.draw(source)) for _ in range(20)) == 0
    assert PoissonSampler(0, 0.5).draw(source).tolist() == []


def test_a_draw_is_ascending_and_int64() -> None:
    indices = PoissonSampler(100, 0.5).draw(SeededSource(1))
    assert indices.dtype == np.int64
    assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(PrivacyError, match="sampling-rate"):
        PoissonSampler(10, rate)


def test_a_negative_number_of_units_is_refused() -> None:
    with pytest.raises(PrivacyError, match="units"):
        PoissonSampler(-1, 0.5)


# --- the records of a unit ------------------------------------------------------------------------------------------

OWNERS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40)
EACH_SOURCE = pytest.mark.parametrize("source", [SeededSource("choice"), SecureSource()], ids=lambda one: one.name)


@given(owners=OWNERS, at_most=st.integers(1, 9), seed=st.integers(0, 2**32), data=st.data())
def test_a_drawn_unit_brings_all_its_records_or_the_bound_and_no_other_unit_any(
    owners: list[str], at_most: int, seed: int, data: st.DataObject
) -> None:
    units = Units.grouped(owners)
    drawn = np.array(sorted(data.draw(st.sets(st.integers(0, units.count - 1)))), dtype=np.int64)
    chosen = choose_records(units, drawn, at_most, SeededSource(seed))
    assert chosen.dtype == np.int64
    assert len(set(chosen.tolist())) == len(chosen)
    brought = np.bincount(units.of_record[chosen], minlength=units.count)
    expected = [min(at_most, size) if unit in drawn else 0 for unit, size in enumerate(units.sizes)]
    assert brought.tolist() == expected


@EACH_SOURCE
def test_every_record_of_a_large_unit_is_used_alike_over_the_steps(source: Any) -> None:
    units = Units.grouped(["small"] * 2 + ["large"] * 20)
    used = np.zeros(22)
    for _ in range(2000):
        used[choose_records(units, np.array([0, 1]), 4, source)] += 1
    assert used[2:].sum() == 2000 * 4
    assert chisquare(used[2:]).pvalue > 1e-6
    assert used[:2].tolist() == [2000, 2000]


@EACH_SOURCE
def test_two_records_of_a_unit_are_chosen_together_as_often_as_any_others(source: Any) -> None:
    units = Units.grouped(["large"] * 6)
    pairs = np.zeros((6, 6))
    for _ in range(3000):
        one, two = choose_records(units, np.array([0]), 2, source)
        pairs[one, two] += 1
    assert chisquare(pairs[np.triu_indices(6, 1)]).pvalue > 1e-6


def test_what_a_unit_brings_does_not_depend_on_another_units_records() -> None:
    """A seeded stream is shared with the units before it alone; a larger neighbour after it changes nothing."""
    owners = ["a"] * 10 + ["b"] * 3
    few, many = (
        choose_records(Units.grouped(owners + ["b"] * more), np.array([0, 1]), 4, SeededSource("same"))
        for more in (0, 30)
    )
    assert [at for at in few if at < 10] == [at for at in many if at < 10]


def test_units_of_single_records_use_no_random_number() -> None:
    source, untouched = SeededSource("stream"), SeededSource("stream")
    for units in (Units.each_record(5), Units.grouped(["c", "a", "b"])):
        assert choose_records(units, np.array([0, 2]), None, source).tolist() == units.by_unit[[0, 2]].tolist()
    assert np.array_equal(source.uniform(3), untouched.uniform(3))


def test_no_drawn_unit_brings_no_record() -> None:
    assert choose_records(Units.grouped([*"aab"]), np.empty(0, np.int64), 1, SeededSource("none")).tolist() == []


def test_a_bound_below_one_record_is_refused() -> None:
    with pytest.raises(PrivacyError, match="unit-records"):
        choose_records(Units.grouped([*"aab"]), np.array([0]), 0, SeededSource("none"))


# --- physical batches -----------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=60), limit=st.integers(1, 9), data=st.data())
def test_physical_batches_hold_each_drawn_record_exactly_once(lengths: Any, limit: int, data: st.DataObject) -> None:
    drawn = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1))))
    batches = physical_batches(np.array(drawn, dtype=np.int64), lengths, limit)
    assert sorted(int(i) for batch in batches for i in batch) == drawn
    assert all(0 < len(batch) <= limit for batch in batches)
    assert len(batches) == math.ceil(len(drawn) / limit)


def test_physical_batches_waste_less_padding_than_the_drawn_order() -> None:
    lengths = np.array([5, 100, 7, 90, 6, 95])
    indices = np.arange(6)
    padded = [int(lengths[batch].max()) * len(batch) for batch in physical_batches(indices, lengths, 2)]
    assert padded == [200, 180, 12]  # in the drawn order it would be 200, 180, 190


def test_physical_batches_are_deterministic_for_equal_lengths() -> None:
    batches = physical_batches(np.array([4, 2, 9, 7]), [3] * 10, 3)
    assert [batch.tolist() for batch in batches] == [[4, 2, 9], [7]]


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(PrivacyError, match="physical-batch"):
        physical_batches(np.array([0]), [1], 0)


@given(
    records=st.lists(st.tuples(st.integers(1, 60), st.sampled_from("abcdef")), min_size=1, max_size=50),
    limit=st.integers(1, 12),
    tokens=st.none() | st.integers(1, 300),
    grouped=st.booleans(),
    data=st.data(),
)
def test_a_physical_batch_keeps_both_bounds_and_units_stay_together(
    records: Any, limit: int, tokens: int | None, grouped: bool, data: st.DataObject
) -> None:
    lengths, owners = (np.array(column) for column in zip(*records, strict=True))
    units = Units.grouped(owners) if grouped else Units.each_record(len(lengths))
    drawn = np.array(sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1)))), dtype=np.int64)
    batches = physical_batches(drawn, lengths, limit, tokens, units)
    assert sorted(int(at) for batch in batches for at in batch) == drawn.tolist()
    for batch in batches:
        assert 0 < len(batch) <= limit
        assert tokens is None or len(batch) == 1 or len(batch) * lengths[batch].max() <= tokens
    order = units.of_record[np.concatenate([np.empty(0, np.int64), *batches])]
    assert np.count_nonzero(np.diff(order)) == max(0, len(set(order.tolist())) - 1)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), tokens=st.integers(1, 300))
def test_a_batch_ends_only_where_the_next_record_would_break_a_bound(lengths: list[int], tokens: int) -> None:
    batches = physical_batches(np.arange(len(lengths)), lengths, 8, tokens)
    for one, following in pairwise(batches):
        longest = max(lengths[at] for at in [*one, following[0]])
        assert len(one) == 8 or (len(one) + 1) * longest > tokens


def test_a_record_longer_than_the_bound_forms_a_batch_of_its_own() -> None:
    batches = physical_batches(np.arange(4), [5, 90, 200, 5], 32, 100)
    assert [batch.tolist() for batch in batches] == [[2], [1], [0, 3]]


def test_bounding_tokens_lets_short_records_be_many() -> None:
    lengths = [512] * 4 + [16] * 64
    batches = physical_batches(np.arange(68), lengths, 64, 1024)
    assert [len(batch) for batch in batches] == [2, 2, 64]


def test_units_are_sorted_by_their_longest_record_and_their_records_by_length() -> None:
    lengths, owners = [1, 9, 5, 7, 8, 2], ["a", "a", "b", "b", "c", "c"]
    (batch,) = physical_batches(np.arange(6), lengths, 32, None, Units.grouped(owners))
    assert batch.tolist() == [1, 0, 4, 5, 3, 2]


def test_without_a_drawn_record_there_is_no_batch() -> None:
    assert physical_batches(np.empty(0, np.int64), [1, 2], 3, 4, Units.grouped([*"ab"])) == []


def test_a_token_bound_below_one_is_refused() -> None:
    with pytest.raises(PrivacyError, match="physical-batch"):
        physical_batches(np.array([0]), [1], 1, 0)
