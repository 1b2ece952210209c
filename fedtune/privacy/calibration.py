"""From a promise to a noise multiplier: the smallest σ whose accounted ε does not exceed the target.

Uses the accountant that reports after training, so that the forecast and the spent ε agree. Knows nothing of plans.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import PESSIMISM, Mechanism, pld_epsilon

if TYPE_CHECKING:
    from collections.abc import Callable

SMALLEST, LARGEST = 0.05, 1e4
TOLERANCE = 1e-3


@lru_cache(maxsize=256)
def calibrate(
    epsilon: float, delta: float, sampling_rate: float, steps: int, also: tuple[Mechanism, ...] = ()
) -> float:
    """Return σ such that `steps` Poisson-subsampled Gaussian steps at rate q are (ε, δ)-private by the PLD accountant.

    ε is that of the steps together with the mechanisms `also`, (σ, q, steps) each, whose noise is given. ε(σ) ≤
    `epsilon` always holds, and ε(σ/(1 + 1e-3)) would exceed it, except at the floor: σ is never below 0.05, where less
    noise buys no accuracy. Raises PrivacyError for ε ≤ 0, δ outside (0, 1), a rate outside (0, 1], fewer than one step,
    or a promise that would need σ above 10,000.
    """
    _check(epsilon, delta, sampling_rate, steps)

    def search(pessimism: float, guess: float, stride: float) -> float:
        @cache
        def spent(sigma: float) -> float:
            # Sorted as the accountant sorts a history, so that both find the same ε to the last bit.
            return pld_epsilon(tuple(sorted([(sigma, sampling_rate, steps), *also])), delta, pessimism)

        return _smallest(spent, epsilon, guess, stride)

    # A coarse grid finds the neighbourhood at a tenth of the cost; only the fine grid decides.
    near = search(100 * PESSIMISM, _first_guess(epsilon, delta, sampling_rate, steps), 1.05)
    return search(PESSIMISM, near, 1.002)


def noise_of_share(epsilon: float, delta: float, share: float, runs: int) -> float:
    """Return σ such that `runs` Gaussian releases together use `share` of what (ε, δ) affords: σ_G·√(runs/share).

    σ_G is the multiplier of the one Gaussian release that is exactly (ε, δ)-private. What Gaussian releases add up is
    1/σ², so these use `share` of 1/σ_G², and training without subsampling needs 1/√(1 - share) times its noise: 2.6 %
    more for a share of 0.05. Raises PrivacyError as `calibrate` does, and for a share outside (0, 1).
    """
    import dp_accounting

    _check(epsilon, delta, 1.0, runs)
    if not 0 < share < 1:
        raise PrivacyError("share", f"the evaluations' share of the budget is {share}; it must be in (0, 1).")
    return float(dp_accounting.get_sigma_gaussian(epsilon, delta)) * math.sqrt(runs / share)


def _check(epsilon: float, delta: float, sampling_rate: float, steps: int) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(
            "epsilon",
            f"ε is {epsilon}; a privacy promise needs a finite ε above 0.",
            hint="Set privacy.epsilon, usually between 1 and 10, or privacy.mode=off for a study without privacy.",
        )
    if not 0 < delta < 1:
        raise PrivacyError(
            "delta",
            f"δ is {delta}; it is a probability strictly between 0 and 1.",
            hint="Set privacy.delta below 1 / (number of units), or leave it out for 1/N^1.1.",
        )
    if not 0 < sampling_rate <= 1:
        raise PrivacyError("sampling-rate", f"the sampling rate is {sampling_rate}; it must be in (0, 1].")
    if steps < 1:
        raise PrivacyError("steps", f"a study of {steps} steps has nothing to calibrate.")


def _first_guess(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """σ by the central limit theorem, μ² = q² n (e^(1/σ²) - 1) (Bu et al. 2020).

    It understates ε (up to 13 times, measured), so it only starts the search; at rate 1 the exact μ² = n/σ² is used.
    """
    import dp_accounting

    mu = 1 / float(dp_accounting.get_sigma_gaussian(epsilon, delta))
    if sampling_rate == 1:
        return math.sqrt(steps) / mu
    return float(1 / math.sqrt(math.log1p((mu / sampling_rate) ** 2 / steps)))


def _smallest(spent: Callable[[float], float], epsilon: float, guess: float, stride: float) -> float:
    """Return the least σ with spent(σ) ≤ ε, rounded up by at most the tolerance."""
    low, high = _bracket(spent, epsilon, guess, stride)
    if low is None:
        return high
    sigma = _root(spent, epsilon, low, high)
    while spent(sigma) > epsilon:  # the root is within a quarter of the tolerance, on either side
        sigma *= 1 + TOLERANCE / 4
    return sigma


def _bracket(
    spent: Callable[[float], float], epsilon: float, guess: float, stride: float
) -> tuple[float | None, float]:
    """(low, high) with spent(low) > ε ≥ spent(high), `stride` apart if the guess was good; low is None at the floor."""
    low, high = None, min(max(guess, SMALLEST), LARGEST)
    while spent(high) > epsilon:
        if high >= LARGEST:
            raise PrivacyError(
                "unreachable",
                f"ε = {epsilon:g} would need a noise multiplier above {LARGEST:g}, which drowns every update.",
                hint="Raise privacy.epsilon or privacy.delta, or take fewer rounds, local steps or records a step.",
            )
        low, high, stride = high, min(high * stride, LARGEST), stride**2
    while low is None and high > SMALLEST:
        candidate = max(high / stride, SMALLEST)
        if spent(candidate) > epsilon:
            low = candidate
        else:
            high, stride = candidate, stride**2
    return low, high


def _root(spent: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """Brent's method on log ε against log σ, which is nearly a straight line."""
    from scipy.optimize import brentq

    def gap(log_sigma: float) -> float:
        return math.log(spent(math.exp(log_sigma)) / epsilon)

    return math.exp(brentq(gap, math.log(low), math.log(high), xtol=TOLERANCE / 4))
