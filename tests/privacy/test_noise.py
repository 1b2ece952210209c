"""Noise is as large as the sum's sensitivity says, and the denominator is public."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from fedtune.errors import PrivacyError
from fedtune.privacy.clipping import ClippedSum, clip_and_sum
from fedtune.privacy.noise import add_noise, mean_without_noise
from fedtune.privacy.random import RandomSource, SecureSource, SeededSource

SIZE = 100_000


@pytest.mark.parametrize("source", [SeededSource("noise"), SecureSource()], ids=["seeded", "secure"])
@pytest.mark.parametrize(("sigma", "clip_norm"), [(1.3, 0.5), (20.0, 3.0)])
def test_the_noise_is_gaussian_with_the_promised_deviation(
    source: RandomSource, sigma: float, clip_norm: float
) -> None:
    result = add_noise(ClippedSum.zero(SIZE, clip_norm), sigma, source, expected_batch=4.0)
    assert result.noise_std == sigma * clip_norm
    assert kstest(result.mean.double().numpy() * 4.0 / result.noise_std, "norm").pvalue > 1e-6


def test_the_sum_is_divided_by_the_expected_batch_and_not_by_the_drawn_one() -> None:
    rows = torch.full((3, SIZE), 1e-3)
    result = add_noise(clip_and_sum(rows, 1.0), 1e-3, SeededSource("mean"), expected_batch=50.0)
    assert result.denominator == 50.0
    assert float(result.mean.mean()) == pytest.approx(3 * 1e-3 / 50.0, rel=0.01)
    assert result.mean.dtype == torch.float32


def test_an_empty_batch_is_a_step_of_noise() -> None:
    result = add_noise(ClippedSum.zero(1000, 1.0), 1.0, SeededSource("empty"), expected_batch=8.0)
    assert float(result.mean.std()) == pytest.approx(1 / 8, rel=0.1)


def test_the_noise_follows_the_sensitivity_of_the_sum() -> None:
    small, large = (
        add_noise(ClippedSum.zero(SIZE, c), 1.0, SeededSource("same"), expected_batch=1.0) for c in (0.5, 2.0)
    )
    assert torch.allclose(large.mean, 4 * small.mean, atol=1e-5)


def test_noisy_sums_lie_on_one_grid_whatever_the_sum_was() -> None:
    """Low-order bits of the result are the grid's, so they cannot tell one sum from another."""
    std, step = 0.75, 2.0**-21
    for shift in (0.0, 1e-9, math.pi / 10, 0.3 + 2**-40):
        total = torch.full((1000,), shift, dtype=torch.float64)
        noisy = add_noise(ClippedSum(total, std, 1, 0, 0), 1.0, SeededSource(str(shift)), expected_batch=1.0)
        # The mean is float32, which is exact for grid points below 2^24 steps, about 10 standard deviations.
        points = noisy.mean.double().numpy() / step
        assert np.array_equal(points, np.round(points))


@pytest.mark.parametrize("shift", [0.0, 1 / 3, 2.0**-23, 5.3])
def test_the_low_bits_of_a_noisy_sum_are_uniform_whatever_the_sum_was(shift: float) -> None:
    """Neighbouring grid points are equally likely, from a sum on the grid and from one between its points."""
    total = torch.full((SIZE,), shift, dtype=torch.float64)
    noisy = add_noise(ClippedSum(total, 1.0, 1, 0, 0), 1.0, SeededSource("low bits"), expected_batch=1.0)
    low = (noisy.mean.double().numpy() * 2**20).astype(np.int64) % 64  # exact: float32 holds the grid below 16
    assert chisquare(np.bincount(low, minlength=64)).pvalue > 1e-6


def test_adding_noise_leaves_the_sum_as_it_was() -> None:
    clipped = clip_and_sum(torch.ones(2, 5), 1.0)
    before = clipped.total.clone()
    add_noise(clipped, 1.0, SeededSource("read only"), expected_batch=1.0)
    assert torch.equal(clipped.total, before)


def test_the_result_is_the_rounded_sum_of_signal_and_noise_over_the_expected_batch() -> None:
    torch.manual_seed(0)
    total, sigma, clip_norm = torch.randn(1001, dtype=torch.float64), 0.7, 0.3
    noise = SeededSource("formula").normal(1001) * sigma * clip_norm
    result = add_noise(ClippedSum(total, clip_norm, 1, 0, 0), sigma, SeededSource("formula"), expected_batch=6.4)
    step = 2.0**-23  # the power of two below sigma * clip_norm, times 2^-20
    expected = np.round((total.numpy() + noise) / step) * step / 6.4
    assert result.mean.tolist() == expected.astype(np.float32).tolist()


def test_successive_steps_have_independent_noise() -> None:
    source = SeededSource("steps")
    first, second = (add_noise(ClippedSum.zero(SIZE, 1.0), 1.0, source, 1.0).mean for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(SIZE)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_private_step_without_noise_is_refused(sigma: float) -> None:
    with pytest.raises(PrivacyError, match="no-noise"):
        add_noise(ClippedSum.zero(3, 1.0), sigma, SeededSource(1), 1.0)


@pytest.mark.parametrize("expected", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_denominator_is_refused(expected: float) -> None:
    with pytest.raises(PrivacyError, match="expected-batch"):
        add_noise(ClippedSum.zero(3, 1.0), 1.0, SeededSource(1), expected)
    with pytest.raises(PrivacyError, match="expected-batch"):
        mean_without_noise(torch.zeros(3), expected)


def test_the_mean_without_noise_says_that_it_has_none() -> None:
    result = mean_without_noise(torch.tensor([2.0, 4.0]), 4.0)
    assert result.mean.tolist() == [0.5, 1.0]
    assert result.noise_std == 0
