"""Seeded and secure streams: distribution, independence, reproducibility."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import kstest, norm

from fedtune.errors import PrivacyError
from fedtune.privacy.random import RandomSource, SecureSource, SeededSource, normals, uniforms

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCES = [lambda: SeededSource("test", 0), SecureSource]
ONES = np.uint64(2**64 - 1)
PINNED_UNIFORM = [0.7326513057055416, 0.7044816348203419]
PINNED_NORMAL = [-0.3416008390160915, -0.1844719714659535]


@pytest.mark.parametrize("make", SOURCES)
def test_uniforms_and_normals_have_their_distribution(make: Callable[[], RandomSource]) -> None:
    source = make()
    # A true source falls below 1e-6 once in a million runs.
    assert kstest(source.uniform(100_000), "uniform").pvalue > 1e-6
    assert kstest(source.normal(100_000), "norm").pvalue > 1e-6


@pytest.mark.parametrize("make", SOURCES)
def test_normals_have_the_right_tails(make: Callable[[], RandomSource]) -> None:
    draws = np.abs(make().normal(1_000_000))
    for bound in (2.0, 3.0, 4.0):
        expected = 2e6 * norm.sf(bound)
        assert abs((draws > bound).sum() - expected) < 6 * np.sqrt(expected)


@pytest.mark.parametrize("make", SOURCES)
def test_neighbouring_draws_and_signs_are_uncorrelated(make: Callable[[], RandomSource]) -> None:
    draws = make().normal(200_000)
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 6 / np.sqrt(len(draws))
    assert abs((draws > 0).mean() - 0.5) < 3 / np.sqrt(len(draws))


def test_the_same_words_give_the_same_stream_and_it_continues() -> None:
    first, second = SeededSource(7, "site", 3), SeededSource(7, "site", 3)
    assert np.array_equal(first.normal(10), second.normal(10))
    assert not np.array_equal(first.normal(10), SeededSource(7, "site", 3).normal(10))
    assert np.array_equal(SeededSource(1).uniform(6), np.concatenate([(s := SeededSource(1)).uniform(2), s.uniform(4)]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((5,), (5 + 2**32,)),
        ((5,), (5 + 2**64,)),
        ((1,), ("1",)),
        (("a", "bc"), ("ab", "c")),
        ((1, 2), (12,)),
        ((1,), (1, 0)),
    ],
)
def test_different_words_are_different_streams(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """A torch CPU generator would not tell 5 from 5 + 2^32."""
    left, right = SeededSource(*one).normal(50_000), SeededSource(*other).normal(50_000)
    assert abs(np.corrcoef(left, right)[0, 1]) < 6 / np.sqrt(50_000)
    assert not np.intersect1d(left, right).size


def test_a_seeded_stream_is_the_same_on_every_machine() -> None:
    """Raw PCG64DXSM words are stable between versions of NumPy; these values pin the way from words to draws."""
    assert SeededSource("fedtune", 0).uniform(2).tolist() == PINNED_UNIFORM
    assert SeededSource("fedtune", 0).normal(2).tolist() == pytest.approx(PINNED_NORMAL, rel=1e-12)


def test_no_word_makes_a_zero_a_one_or_an_infinity() -> None:
    words = np.array([0, ONES, ONES, 0, 0, 0, ONES, ONES], dtype=np.uint64)
    assert 0 < uniforms(words).min() < uniforms(words).max() < 1
    assert uniforms(np.array([0, ONES], dtype=np.uint64)).sum() == 1
    assert np.isfinite(normals(words)).all()


def test_the_tail_reaches_past_what_one_word_allows() -> None:
    extreme = normals(np.array([0, 0, 0, 1], dtype=np.uint64))
    assert extreme[0] > 12
    assert extreme[1] == -extreme[0]


def test_a_number_names_the_same_stream_whatever_its_type() -> None:
    assert np.array_equal(SeededSource(np.int64(5)).uniform(3), SeededSource(5).uniform(3))


def test_a_stream_needs_a_name() -> None:
    with pytest.raises(PrivacyError, match="unnamed-stream"):
        SeededSource()


def test_two_secure_sources_and_a_copy_are_different_streams() -> None:
    source = SecureSource()
    assert not np.intersect1d(source.normal(1000), SecureSource().normal(1000)).size
    assert not np.intersect1d(source.normal(1000), copy.deepcopy(source).normal(1000)).size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_does_not_repeat_its_parents_noise() -> None:
    source = SecureSource()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - runs in the child
        os.write(writer, source.normal(8).tobytes())
        os._exit(0)
    theirs = np.frombuffer(os.read(reader, 64), dtype=np.float64)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert len(theirs) == 8
    assert not np.intersect1d(source.normal(8), theirs).size
