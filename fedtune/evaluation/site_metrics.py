"""Held-out numbers that leave a site: as they are, rounded, or noised and charged to ε, as the plan says.

`clear` is the site's `Tally`. The other two are means over privacy units, so that a patient with many records counts
once and no one bounds how many. Sites' means add up to those of all units together.

Knows no model, no message and no ledger; what a record scores comes from `fedtune.training.evaluate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import MessageError, PrivacyError
from fedtune.evaluation.metrics import Tally, language_metrics, total
from fedtune.privacy.clipping import clip_and_sum
from fedtune.privacy.noise import add_noise
from fedtune.privacy.plan import public_count

if TYPE_CHECKING:
    from fedtune.config.plan import StudyPlan
    from fedtune.data.tasks import Task
    from fedtune.data.units import Units
    from fedtune.privacy.accounting import Event
    from fedtune.privacy.clipping import ClippedSum
    from fedtune.privacy.random import RandomSource

Floats = NDArray[np.float64]

FEWEST_UNITS = 10  # rounding hides nothing in the means of fewer, and nothing of them is sent
FINE_UNITS = 100  # from here on means are rounded to hundredths of their range, below to tenths
WORST_TOKEN_LOSS = 8.0  # nats; a text whose tokens all have probability 3e-4


def ranges(task: Task) -> Floats:
    """Return the largest value of each number of a record (d,); the smallest is 0.

    Classification has two: whether it is right, and its loss up to twice that of guessing, 2 ln K. Language modelling
    has one: the loss a token of the record, up to 8 nats. They depend on the plan alone, because noise grows with them.
    """
    if task.kind == "classification":
        return np.array([1.0, 2 * math.log(max(2, len(task.labels)))])
    return np.array([WORST_TOKEN_LOSS])


@dataclass(frozen=True, slots=True, eq=False)
class UnitScores:
    """What a site's held-out units score: `values` (units, d), each between 0 and `ranges` (d,). Stays at the site."""

    values: Floats
    ranges: Floats

    @classmethod
    def of(cls, numbers: Floats, units: Units, task: Task) -> UnitScores:
        """Average the records' numbers (n, d) over each unit; what is above its range, or no number, counts as that."""
        largest = ranges(task)
        if numbers.shape != (len(units.of_record), len(largest)):
            raise PrivacyError("units", f"{len(units.of_record)} records have units, {len(numbers)} have numbers")
        bounded = np.clip(np.where(np.isnan(numbers), largest, numbers), 0, largest)
        sums = np.zeros((units.count, len(largest)))
        np.add.at(sums, units.of_record, bounded)
        return cls(sums / units.sizes[:, None], largest)

    def centred_sum(self) -> ClippedSum:
        """Return Σ_u 2(x_u/range - ½)/√d, (d,): a unit more or less moves it by at most 1 in L2 norm.

        Centring halves what a unit can contribute, and so the noise that hides it.
        """
        import torch

        rows = (self.values / self.ranges - 0.5) * (2 / math.sqrt(len(self.ranges)))
        return clip_and_sum(torch.from_numpy(rows), 1.0)


@dataclass(frozen=True, slots=True)
class UnitMeans:
    """Means over held-out units as they left a site, or several: (accuracy, loss), or the loss a token alone.

    `units` is the rounded number of units, which weighs a site in a total. `noise` is the standard deviation of the
    noise in each mean, all 0 where means are rounded.
    """

    means: tuple[float, ...]
    units: int
    noise: tuple[float, ...]

    def metrics(self) -> dict[str, float]:
        """Return the task's metrics, as NAME_noise the noise in each; empty when nothing was measured.

        Noise can carry a mean out of its range; it is brought back, which is post-processing.
        """
        if not self.units:
            return {}
        loss = max(0.0, self.means[-1])
        named = language_metrics(loss, 1)
        if len(self.means) > 1:
            named = {"accuracy": min(1.0, max(0.0, self.means[0])), "loss": loss}
        noise = zip(("accuracy", "loss")[-len(self.means) :], self.noise, strict=True)
        return named | {f"{name}_noise": deviation for name, deviation in noise if deviation}

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return `means` (d,) float64 and `units` (1,) int64; the noise follows from the plan."""
        return {"means": np.array(self.means, np.float64), "units": np.array([self.units], np.int64)}


Measured = Tally | UnitMeans


def coarse_means(scores: UnitScores) -> UnitMeans:
    """Round each mean to hundredths of its range: tenths below 100 units, nothing of fewer than 10.

    One unit more or less moves what is sent by one such step at most, mostly by none. This hides single units from a
    casual eye; it is no differential privacy, and no ε covers it.
    """
    count, numbers = scores.values.shape
    if count < FEWEST_UNITS:
        return UnitMeans((0.0,) * numbers, 0, (0.0,) * numbers)
    digits = 2 if count >= FINE_UNITS else 1
    means = (scores.values.mean(axis=0) / scores.ranges).round(digits) * scores.ranges
    return UnitMeans(tuple(map(float, means)), public_count(count), (0.0,) * numbers)


def noisy_means(scores: UnitScores, noise_multiplier: float, source: RandomSource) -> UnitMeans:
    """Return the means from one Gaussian mechanism over all units: N(0, σ² I) on a sum of sensitivity 1.

    The sum is divided by the rounded count of units, at least 1: the exact one is private. Noise is added whether there
    are units or not. In shares of a number's range its standard deviation is σ√d/(2N̂).
    """
    units = max(1, public_count(len(scores.values)))
    noisy = add_noise(scores.centred_sum(), noise_multiplier, source, units).mean.double().numpy()
    means = scores.ranges * (0.5 + noisy * math.sqrt(len(noisy)) / 2)
    return UnitMeans(tuple(map(float, means)), units, _deviations(scores.ranges, noise_multiplier, units))


def _deviations(largest: Floats, noise_multiplier: float, units: int) -> tuple[float, ...]:
    return tuple(float(each) for each in noise_multiplier * math.sqrt(len(largest)) / 2 / units * largest)


def measured_on(plan: StudyPlan) -> str:
    """Say what the sites' metrics are of and how they left; every output that shows them says this."""
    how = {"coarse": "held-out units of all sites, rounded", "noisy": "held-out units of all sites, noise charged to ε"}
    return how.get(plan.evaluation.site_metrics, "held-out records of all sites")


def event_of_evaluation(plan: StudyPlan) -> Event | None:
    """Return what one evaluation of this plan costs a site: None unless its metrics are noisy.

    Error: `privacy.uncovered-evaluations` where the plan measures more often than its promise covers.
    """
    if plan.evaluation.site_metrics != "noisy":
        return None
    planned, covered = plan.evaluation.count(plan.federation.rounds), plan.promise.evaluations
    if planned > covered:
        raise PrivacyError(
            "uncovered-evaluations",
            f"the plan asks {planned} times for noisy metrics, and its ε covers {covered} such evaluations",
            hint="resolve the plan again: fedtune plan",
        )
    return plan.promise.evaluation_event()


def refuse_unplanned(plan: StudyPlan, number: int) -> None:
    """Refuse an evaluation that the plan does not ask for: `privacy.metrics-off`, `privacy.unplanned-evaluation`."""
    if plan.evaluation.site_metrics == "off":
        raise PrivacyError("metrics-off", "the plan keeps held-out metrics at the site")
    if not plan.evaluation.measures(number, plan.federation.rounds):
        raise PrivacyError("unplanned-evaluation", f"the plan measures nothing after round {number}")


def read_site_metrics(plan: StudyPlan, arrays: Mapping[str, NDArray[Any]]) -> Measured:
    """Read what a site sent as its metrics; anything but this plan's form is `message.broken-tally`."""
    task = plan.task
    if plan.evaluation.site_metrics == "clear":
        return Tally.from_arrays(arrays, len(task.labels) if task.kind == "classification" else None)
    largest = ranges(task)
    shapes = {"means": (largest.shape, np.float64), "units": ((1,), np.int64)}
    if {name: (array.shape, array.dtype.type) for name, array in arrays.items()} != shapes:
        raise MessageError("broken-tally", "a site's means are not those of this task")
    means, units = tuple(map(float, arrays["means"])), int(arrays["units"][0])
    if units < 0 or not all(map(math.isfinite, means)):
        raise MessageError("broken-tally", "a site's means have a negative count or are not finite")
    multiplier = plan.promise.evaluation_noise_multiplier if plan.evaluation.site_metrics == "noisy" else 0.0
    return UnitMeans(means, units, _deviations(largest, multiplier, max(1, units)))


def together(measured: Iterable[Measured]) -> Measured:
    """Return what several sites' releases of one form say together: of all their records, or of all their units.

    The same bits in every order; an empty tally for none.
    """
    parts = list(measured)
    means = [part for part in parts if isinstance(part, UnitMeans)]
    if not means:
        return total(part for part in parts if isinstance(part, Tally))
    units, numbers = sum(part.units for part in means), range(len(means[0].means))
    if not units:
        return means[0]
    return UnitMeans(
        tuple(math.fsum(part.units * part.means[at] for part in means) / units for at in numbers),
        units,
        tuple(math.sqrt(math.fsum((part.units * part.noise[at]) ** 2 for part in means)) / units for at in numbers),
    )
