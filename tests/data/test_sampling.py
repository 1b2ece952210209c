"""Poisson sampling and the cutting of a logical batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest

from fedtune.data.sampling import PoissonSampler, physical_batches
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
