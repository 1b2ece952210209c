"""Checks of a site's round that know nothing of how it is written; each returns whether the round passes.

Two of them look at what the round hands to its own noise and optimiser, through the names that `fedtune.training.local`
uses; all else is what goes in and what comes out.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from fedtune.training import local
from tests.support.reference_round import distance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from tests.support.bench import Bench


def equals_the_reference(site: Bench) -> bool:
    """Two rounds end where a plain float64 loop over single records ends."""
    return all(distance(site, number) < 1e-5 for number in (1, 2))


def respects_the_sensitivity(site: Bench) -> bool:
    """The sum before the noise moves by at most C when a record leaves the site; every fourth is tried."""
    everyone = site.plan_with(privacy__sampling_rate=1.0, training__local_steps=1)
    whole = sum_before_the_noise(everyone)
    others = ([*site.examples[:at], *site.examples[at + 1 :]] for at in range(0, len(site.examples), 4))
    moves = [float((whole - sum_before_the_noise(replace(everyone, examples=left))).norm()) for left in others]
    return max(moves) <= site.plan.promise.clip_norm * (1 + 1e-6)


def has_the_promised_noise(site: Bench) -> bool:
    """Of rounds that are nearly all noise, each is Gaussian with deviation lr·σC/(qN) in every number."""
    loud = site.plan_with(privacy__noise_multiplier=100.0, training__local_steps=1)
    promise, units = loud.plan.promise, len(loud.examples)
    std = loud.plan.training.learning_rate * 100.0 * promise.clip_norm / promise.expected_batch(units)
    return all(_is_standard_normal(_step_of(loud, number) / std) for number in range(1, 11))


def draws_fresh_noise(site: Bench) -> bool:
    """Noise of two steps of a round, of two rounds and of two sites is uncorrelated."""
    loud = site.plan_with(privacy__noise_multiplier=100.0, training__local_steps=2)
    with _seen("optimizers.step") as calls:
        for name, number in (("one", 1), ("one", 2), ("two", 1)):
            loud.round(number, site=name)
    steps = [gradient.numpy() for _optimizer, _parameters, gradient, _factor in calls]
    assert len(steps) == 6
    return all(abs(np.corrcoef(*pair)[0, 1]) < 6 / np.sqrt(len(pair[0])) for pair in combinations(steps, 2))


def sum_before_the_noise(site: Bench) -> torch.Tensor:
    """Return the clipped sum (P,) of the round's one step."""
    with _seen("add_noise") as calls:
        site.round(adapter=site.alive())
    total: torch.Tensor = calls[0][0].total
    return total


def _step_of(site: Bench, number: int) -> NDArray[np.float64]:
    """Return by how much a round moves the adapter."""
    start = site.alive()
    end = site.round(number, start).state
    return np.concatenate([(end[name].astype(np.float64) - start[name]).ravel() for name in sorted(end)])


def _is_standard_normal(values: NDArray[np.float64]) -> bool:
    return bool(kstest(values, "norm").pvalue > 1e-8 and abs(values.std() - 1) < 6 / np.sqrt(2 * len(values)))


@contextmanager
def _seen(name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Note the arguments of every call of something that a round calls; the call itself goes on unchanged."""
    owner, attribute = (local.optimizers, name.split(".")[1]) if "." in name else (local, name)
    right, calls = getattr(owner, attribute), []

    def noted(*args: Any) -> Any:
        calls.append(args)
        return right(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, attribute, noted)
        yield calls
