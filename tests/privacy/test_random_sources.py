"""Seeded and secure streams: distribution, independence, reproducibility, and how fine the normals are."""

from __future__ import annotations

import copy
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import chisquare, kstest, norm

from fedtune.errors import PrivacyError
from fedtune.privacy.random import BLOCK, NEAR_ZERO, RandomSource, SecureSource, SeededSource, normals, uniforms

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCES = [lambda: SeededSource("test", 0), SecureSource]
ONES = np.uint64(2**64 - 1)
PINNED_UNIFORM = [0.7326513057055416, 0.7044816348203419]
PINNED_NORMAL = [-0.31568263876194147, -1.0735236902019099]
# A true source fails a test at this level once in a million runs.
RARE = 1e-6


# --- distribution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", SOURCES)
def test_uniforms_and_normals_have_their_distribution(make: Callable[[], RandomSource]) -> None:
    source = make()
    assert kstest(source.uniform(100_000), "uniform").pvalue > RARE
    assert kstest(source.normal(200_000), "norm").pvalue > RARE


@pytest.mark.parametrize("make", SOURCES)
def test_normals_fall_into_cells_and_tails_as_often_as_they_should(make: Callable[[], RandomSource]) -> None:
    draws, edges = make().normal(2_000_000), np.array([-np.inf, *np.arange(-4.5, 4.75, 0.25), np.inf])
    counts = np.histogram(draws, edges)[0]
    assert chisquare(counts, len(draws) * np.diff(norm.cdf(edges))).pvalue > RARE


@pytest.mark.parametrize("make", SOURCES)
def test_normals_have_the_moments_of_a_normal(make: Callable[[], RandomSource]) -> None:
    draws = make().normal(1_000_000)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)]:
        assert abs((draws**power).mean() - moment) < 5 * np.sqrt(variance / len(draws))


@pytest.mark.parametrize("make", SOURCES)
def test_neighbouring_draws_and_signs_are_uncorrelated(make: Callable[[], RandomSource]) -> None:
    draws = make().normal(200_000)
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 6 / np.sqrt(len(draws))
    assert abs((draws > 0).mean() - 0.5) < 3 / np.sqrt(len(draws))


@pytest.mark.parametrize("make", SOURCES)
def test_the_two_normals_of_a_pair_are_independent(make: Callable[[], RandomSource]) -> None:
    """They share a radius and an angle; only together do these make the two independent."""
    one, two = make().normal(BLOCK).reshape(2, -1)
    bins = np.digitize([one, two], norm.ppf(np.linspace(0, 1, 9)[1:-1]))
    counts = np.bincount(bins[0] * 8 + bins[1], minlength=64)
    assert chisquare(counts).pvalue > RARE
    assert abs(np.corrcoef(one**2, two**2)[0, 1]) < 6 / np.sqrt(len(one))
    assert kstest(np.sum([one**2, two**2], axis=0), "chi2", args=(2,)).pvalue > RARE


# --- how fine and how far -------------------------------------------------------------------------------------------


def words(radial: list[int], angular: list[int]) -> Any:
    return np.array([*radial, *angular], dtype=np.uint64)


def radius_and_angle(radial: int, angular: int) -> tuple[float, float]:
    """Box and Muller's formula on exact integers, for signed words."""
    magnitude = radial if radial < 2**63 else 2**64 - 1 - radial
    low = ((angular % 2**11) + 0.5) / 2**11 if magnitude < NEAR_ZERO else 0.5
    signed = angular if angular < 2**63 else angular - 2**64
    log = math.log(magnitude + low) - 63 * math.log(2) if magnitude < 2**62 else math.log1p(magnitude / 2**63 - 1)
    return math.sqrt(-2 * log), signed * math.pi / 2**63


@pytest.mark.parametrize("radial", [0, 1, 5, 1000, 2**20, 2**40, 2**41 + 1, 2**55, 2**62 + 12345, 2**63 - 2**20])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("angular", [0, 1, 2**11 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 2**20, 12345678901234567])
def test_normals_follow_the_formula_in_every_range(radial: int, negative: bool, angular: int) -> None:
    word = 2**64 - 1 - radial if negative else radial
    radius, angle = radius_and_angle(word, angular)
    cosine, sine = normals(words([word], [angular]))
    assert cosine == pytest.approx(radius * math.cos(angle), rel=1e-9, abs=1e-14 * radius)
    assert sine == pytest.approx(radius * math.sin(angle), rel=1e-9, abs=1e-14 * radius)


def test_the_tail_reaches_past_ten() -> None:
    assert normals(words([0], [0]))[0] == pytest.approx(math.sqrt(2 * 75 * math.log(2)))
    assert normals(words([0], [2**63]))[0] < -10


def gap_of_radii(probability: float) -> float:
    """The distance of neighbouring radii where a pair lies further out with this probability."""
    magnitude = int(probability * 2**63)
    if magnitude < NEAR_ZERO:  # the low bits of the angle's word are one apart, which also turns by 2⁻⁶³·π
        pair = normals(words([magnitude, magnitude], [0, 1]))
    else:
        least = 2 ** max(0, magnitude.bit_length() - 53)
        pair = normals(words([magnitude, magnitude + least], [0, 0]))
    return float(pair[0] - pair[1])


@pytest.mark.parametrize("exponent", [*range(1, 48)])
def test_neighbouring_radii_are_much_closer_than_the_grid(exponent: int) -> None:
    assert 0 <= gap_of_radii(2.0**-exponent) < 2.0**-30


def test_near_the_origin_radii_are_still_closer_than_the_grid() -> None:
    """There the float64 next to 1 decides: u = 1 - k·2⁻⁵³, and a radius below 2⁻²³ has probability 2⁻⁴⁷."""
    steps = [2**63 - k * 2**10 for k in (2**6, 2**6 + 1)]
    inner, outer = normals(words(steps, [0, 0]))[:2]
    assert inner < 2.0**-22
    assert 0 < outer - inner < 2.0**-29


def test_control_radii_of_a_53_bit_uniform_are_as_far_apart_as_the_grid() -> None:
    smaller, larger = (math.sqrt(-2 * math.log(k * 2.0**-53)) for k in (2**17 + 1, 2**17))
    assert larger == pytest.approx(7.06, abs=0.01)
    assert larger - smaller > 2.0**-20


def test_neighbouring_angles_are_much_closer_than_the_grid() -> None:
    for angular in (0, 2**40, 2**61, 2**62, 2**63 - 2**12):
        one, two = normals(words([2**41 - 1] * 2, [angular, angular + 2**11])).reshape(2, 2).T
        assert 0 < np.linalg.norm(two - one) < 2.0**-50 * 8


def test_no_word_makes_a_zero_a_one_or_an_infinity() -> None:
    extremes = [0, 1, 2**41, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1]
    both = np.array([[one, two] for one in extremes for two in extremes], dtype=np.uint64)
    assert np.isfinite(normals(both.T.reshape(-1).copy())).all()
    assert 0 < uniforms(both.reshape(-1)).min() < uniforms(both.reshape(-1)).max() < 1
    assert uniforms(np.array([0, ONES], dtype=np.uint64)).sum() == 1


# --- streams --------------------------------------------------------------------------------------------------------


def test_the_same_words_give_the_same_stream_and_it_continues() -> None:
    first, second = SeededSource(7, "site", 3), SeededSource(7, "site", 3)
    assert np.array_equal(first.normal(10), second.normal(10))
    assert not np.array_equal(first.normal(10), SeededSource(7, "site", 3).normal(10))
    assert np.array_equal(SeededSource(1).uniform(6), np.concatenate([(s := SeededSource(1)).uniform(2), s.uniform(4)]))


def test_normals_do_not_depend_on_the_blocks_they_are_made_in() -> None:
    whole, parts = SeededSource("blocks").normal(2 * BLOCK + 6), SeededSource("blocks")
    assert np.array_equal(whole, np.concatenate([parts.normal(size) for size in (BLOCK, BLOCK, 6)]))


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("n", [0, 1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1])
def test_any_number_of_draws_can_be_had(make: Callable[[], RandomSource], n: int) -> None:
    assert make().normal(n).shape == make().uniform(n).shape == (n,)


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


def test_a_number_names_the_same_stream_whatever_its_type() -> None:
    assert np.array_equal(SeededSource(np.int64(5)).uniform(3), SeededSource(5).uniform(3))


def test_a_stream_needs_a_name() -> None:
    with pytest.raises(PrivacyError, match="unnamed-stream"):
        SeededSource()


def test_two_secure_sources_and_a_copy_are_different_streams() -> None:
    source = SecureSource()
    assert not np.intersect1d(source.normal(1000), SecureSource().normal(1000)).size
    assert not np.intersect1d(source.normal(1000), copy.deepcopy(source).normal(1000)).size


def test_a_secure_stream_never_repeats_its_keystream() -> None:
    source = SecureSource()
    draws = np.concatenate([source.uniform(1000) for _ in range(40)])
    assert len(np.unique(draws)) == len(draws)


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
