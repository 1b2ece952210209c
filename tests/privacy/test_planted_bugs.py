"""Bugs planted in a site's own code: each check passes on the round as it is, and fails on the round with the bug."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedtune.data.sampling import PoissonSampler
from fedtune.privacy.clipping import ClippedSum
from fedtune.privacy.random import RandomSource, SeededSource
from fedtune.training import local
from tests.support.bench import Bench, make_bench
from tests.support.round_checks import (
    draws_fresh_noise,
    equals_the_reference,
    has_the_promised_noise,
    respects_the_sensitivity,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from fedtune.privacy.noise import NoisyGradient

    Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A site whose every record has a gradient far above the clip norm."""
    torch.set_num_threads(1)
    wide: dict[str, Any] = {"lora__rank": 8, "lora__targets": "all-linear"}  # many numbers, to tell noise from less
    made = make_bench(tmp_path_factory.mktemp("site"), "bert", "architecture", **wide)
    return made.plan_with(privacy__clip_norm=1e-3, training__learning_rate=30.0)


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    def total(rows: Tensor, clip_norm: float, *_method: str) -> ClippedSum:
        return ClippedSum(rows.double().sum(0), clip_norm, len(rows), 0, 0)

    patch.setattr(local, "clip_and_sum", total)


def clipping_after_averaging(patch: pytest.MonkeyPatch) -> None:
    right = local.clip_and_sum

    def late(rows: Tensor, *how: Any) -> ClippedSum:
        mean = right(rows.mean(0, keepdim=True), *how)
        return replace(mean, total=mean.total * len(rows), records=len(rows))

    patch.setattr(local, "clip_and_sum", late)


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    right = local.add_noise

    def half(clipped: ClippedSum, sigma: float, *rest: Any) -> NoisyGradient:
        return right(clipped, sigma / 2, *rest)

    patch.setattr(local, "add_noise", half)


def the_drawn_size_as_denominator(patch: pytest.MonkeyPatch) -> None:
    right = local.add_noise

    def divided(clipped: ClippedSum, sigma: float, source: RandomSource, _expected: float) -> NoisyGradient:
        return right(clipped, sigma, source, float(clipped.records))

    patch.setattr(local, "add_noise", divided)


def one_noise_for_all_steps(patch: pytest.MonkeyPatch) -> None:
    right = SeededSource.normal
    drawn: dict[SeededSource, Any] = {}

    def repeated(source: SeededSource, n: int) -> Any:
        return drawn.setdefault(source, right(source, n))

    patch.setattr(SeededSource, "normal", repeated)


def one_seed_for_all_rounds(patch: pytest.MonkeyPatch) -> None:
    right = local._source
    patch.setattr(local, "_source", lambda plan, work: right(plan, replace(work, round=1)))


def one_seed_for_all_sites(patch: pytest.MonkeyPatch) -> None:
    right = local._source
    patch.setattr(local, "_source", lambda plan, work: right(plan, replace(work, site="any")))


def one_record_counted_twice(patch: pytest.MonkeyPatch) -> None:
    right = local.unit_rows

    def doubled(batches: Iterable[Tensor], units: Any) -> Iterator[Tensor]:
        for rows in right(batches, units):
            yield rows
            yield rows[:1]

    patch.setattr(local, "unit_rows", doubled)


def a_fixed_batch_size(patch: pytest.MonkeyPatch) -> None:
    def first_ones(sampler: PoissonSampler, source: RandomSource) -> Any:
        return np.argsort(source.uniform(sampler.units))[: round(sampler.units * sampler.rate)]

    patch.setattr(PoissonSampler, "draw", first_ones)


@pytest.mark.parametrize(
    ("check", "plant"),
    [
        (equals_the_reference, no_clipping),
        (equals_the_reference, clipping_after_averaging),
        (equals_the_reference, half_the_noise),
        (equals_the_reference, the_drawn_size_as_denominator),
        (equals_the_reference, one_seed_for_all_rounds),
        (equals_the_reference, one_seed_for_all_sites),
        (equals_the_reference, one_record_counted_twice),
        (equals_the_reference, a_fixed_batch_size),
        (respects_the_sensitivity, no_clipping),
        (respects_the_sensitivity, clipping_after_averaging),
        (respects_the_sensitivity, one_record_counted_twice),
        (has_the_promised_noise, half_the_noise),
        (has_the_promised_noise, the_drawn_size_as_denominator),
        (draws_fresh_noise, one_noise_for_all_steps),
        (draws_fresh_noise, one_seed_for_all_rounds),
        (draws_fresh_noise, one_seed_for_all_sites),
    ],
)
def test_the_check_fails_with_the_bug(
    site: Bench, monkeypatch: pytest.MonkeyPatch, check: Callable[[Bench], bool], plant: Plant
) -> None:
    plant(monkeypatch)
    assert not check(site)


@pytest.mark.parametrize(
    "check", [equals_the_reference, respects_the_sensitivity, has_the_promised_noise, draws_fresh_noise]
)
@pytest.mark.parametrize("clipping", ["fixed", "auto-s", "auto-v"])
def test_the_check_passes_without_a_bug(site: Bench, check: Callable[[Bench], bool], clipping: str) -> None:
    assert check(site.plan_with(privacy__clipping=clipping))


def test_secure_noise_passes_the_checks_of_noise(site: Bench) -> None:
    secret = site.plan_with(privacy__noise="secure")
    assert has_the_promised_noise(secret)
    assert draws_fresh_noise(secret)
