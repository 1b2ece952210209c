"""Shuffling: each unit once an epoch, in a batch that no other unit changes, accounted without amplification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from fedtune.data.sampling import PoissonSampler, ShuffleSampler, sampler_of
from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import Event, as_poisson, epsilon
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.random import SecureSource, SeededSource
from tests.support.bench import make_bench
from tests.support.reference_round import distance


def test_every_unit_is_in_one_batch_of_each_epoch() -> None:
    batches = list(ShuffleSampler(57, 0.2).draws(SeededSource("epochs"), 15))
    assert len(batches) == 15
    for epoch in range(3):
        together = np.concatenate(batches[5 * epoch : 5 * epoch + 5])
        assert sorted(together.tolist()) == list(range(57))


def test_each_epoch_is_dealt_anew_and_evenly() -> None:
    batches = list(ShuffleSampler(2000, 0.25).draws(SecureSource(), 8))
    assert not np.array_equal(batches[0], batches[4])
    assert chisquare([len(batch) for batch in batches[:4]]).pvalue > 1e-6


def test_one_more_unit_changes_one_batch_only() -> None:
    """A permutation that is cut into equal batches would move others from batch to batch."""

    class SameForTheFirst:
        """The neighbour's draws: the other units' are the same, and the last unit's is added."""

        name = "seeded"

        def __init__(self) -> None:
            self.numbers = SeededSource("numbers").uniform(31)

        def uniform(self, n: int) -> np.ndarray:
            return self.numbers[:n]

        def normal(self, n: int) -> np.ndarray:
            raise AssertionError

    with_unit = list(ShuffleSampler(31, 0.2).draws(SameForTheFirst(), 5))
    without = list(ShuffleSampler(30, 0.2).draws(SameForTheFirst(), 5))
    differing = [step for step in range(5) if not np.array_equal(with_unit[step], without[step])]
    assert len(differing) == 1
    assert set(with_unit[differing[0]]) - set(without[differing[0]]) == {30}


def test_no_units_give_empty_steps() -> None:
    assert [batch.tolist() for batch in ShuffleSampler(0, 0.5).draws(SeededSource(1), 2)] == [[], []]


@pytest.mark.parametrize("rate", [0.3, 0.15, 0.7])
def test_a_rate_that_divides_no_epoch_is_refused(rate: float) -> None:
    with pytest.raises(PrivacyError, match="epoch"):
        ShuffleSampler(10, rate)


def test_part_of_an_epoch_is_refused() -> None:
    with pytest.raises(PrivacyError, match="whole epochs"):
        list(ShuffleSampler(10, 0.1).draws(SeededSource(1), 15))


def test_the_plans_sampler_is_the_one_that_draws() -> None:
    assert sampler_of("poisson", 9, 0.5) == PoissonSampler(9, 0.5)
    assert sampler_of("shuffle", 9, 0.5) == ShuffleSampler(9, 0.5)


def test_an_epoch_is_accounted_as_one_plain_gaussian_step() -> None:
    shuffled = Event(1.3, 0.1, 40, 1.0, sampler="shuffle")
    plain = Event(1.3, 1.0, 4, 1.0)
    assert epsilon([shuffled], 1e-5) == epsilon([plain], 1e-5)
    assert as_poisson("shuffle", 0.1, 40) == (1.0, 4)


def test_shuffling_costs_what_poisson_sampling_does_not() -> None:
    """The design's figures: the same ten epochs at σ = 1 and q = 0.01 are ε = 1.83 as Poisson and 17.9 as shuffled."""
    assert epsilon([Event(1.0, 0.01, 1000, 1.0)], 1e-5) == pytest.approx(1.83, abs=0.01)
    assert epsilon([Event(1.0, 0.01, 1000, 1.0, sampler="shuffle")], 1e-5) == pytest.approx(17.86, abs=0.02)


def test_a_plan_is_calibrated_for_its_sampler_and_says_so() -> None:
    terms = {"epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "sampling_rate": 0.1, "max_steps": 20}
    shuffled, poisson = PrivacyPlan.calibrated(**terms, sampler="shuffle"), PrivacyPlan.calibrated(**terms)
    assert shuffled.noise_multiplier > 1.2 * poisson.noise_multiplier
    assert shuffled.forecast() <= 8.0
    assert "20 shuffled steps (no amplification claimed) at rate 0.1" in shuffled.statement
    assert "20 Poisson-sampled steps at rate 0.1" in poisson.statement


def test_a_shuffled_round_equals_the_plain_reference(tmp_path: Path) -> None:
    assert distance(make_bench(tmp_path, training__sampler="shuffle", training__local_steps=4)) < 1e-5


def test_rounds_that_are_not_whole_epochs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"training\.local_steps=3 .*whole number"):
        make_bench(tmp_path, training__sampler="shuffle", training__local_steps=3)
