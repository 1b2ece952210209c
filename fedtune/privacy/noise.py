"""Gaussian noise on a clipped sum: the step at which the gradient becomes private.

The standard deviation is computed from the sum's own sensitivity, so it cannot be calibrated to another clip norm.
Knows nothing of models, batches or accountants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedtune.errors import PrivacyError

if TYPE_CHECKING:
    from fedtune.privacy.clipping import ClippedSum
    from fedtune.privacy.random import RandomSource

GRID_BITS = 20


@dataclass(frozen=True, slots=True)
class NoisyGradient:
    """`mean` (P,) float32 = (sum + noise) / `denominator`.

    `noise_std` is the noise's standard deviation on each coordinate of the sum, before the division; 0 means that
    nothing here is private.
    """

    mean: Tensor
    noise_std: float
    denominator: float


def add_noise(
    clipped: ClippedSum, noise_multiplier: float, source: RandomSource, expected_batch: float
) -> NoisyGradient:
    """Return (Σ + N(0, σ²C² I)) / (q·N) with σ the noise multiplier and C the sum's sensitivity.

    `expected_batch` is q·N with the public N of the plan, never the number of records drawn: that number is private,
    and dividing by it would let one record change the scale of all others.

    The addition is float64, and Σ + noise is then rounded to a grid of at most σC·2⁻²⁰. Without the grid, the low-order
    bits of a floating-point sum tell which sums are possible (Mironov 2012; Jin et al., arXiv 2107.10138). The grid
    removes them: neighbouring values of the noise lie 2³⁰ times closer than the grid, and 2⁹ times closer but for an
    event of probability 2⁻⁴⁶ a pair (`random.normals`), so every grid point within ten deviations of a sum is reached
    from it, with nearly its Gaussian probability. Only the result is rounded, which is post-processing; rounding the
    sum first would raise its sensitivity by up to √P half grid steps. What this is not: a proof to the last bit (a
    discrete Gaussian sampled exactly would be), nor a defence against timing.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise PrivacyError(
            "no-noise",
            f"the noise multiplier is {noise_multiplier}; a private step needs one above 0.",
            hint="Set privacy.mode=off if this study is meant to be without privacy.",
        )
    _check(expected_batch)
    std = noise_multiplier * clipped.sensitivity
    step = _grid_step(std)
    noise = torch.from_numpy(source.normal(clipped.total.numel())).mul_(std / step)
    # In grid steps: scaling by a power of two is exact, so this rounds as Σ + noise itself would.
    noisy = noise.to(clipped.total.device).add_(clipped.total.double(), alpha=1 / step).round_()
    return NoisyGradient(noisy.mul_(step / expected_batch).float(), std, expected_batch)


def mean_without_noise(total: Tensor, denominator: float) -> NoisyGradient:
    """Return total / denominator for a study with `privacy.mode=off`; the result protects nobody."""
    _check(denominator)
    return NoisyGradient((total.double() / denominator).float(), 0.0, denominator)


def _check(denominator: float) -> None:
    if not (math.isfinite(denominator) and denominator > 0):
        raise PrivacyError("expected-batch", f"the expected batch size is {denominator}; it must be above 0.")


def _grid_step(std: float) -> float:
    """Return the power of two between half of std·2^-GRID_BITS and the whole."""
    return math.ldexp(1.0, math.floor(math.log2(std)) - GRID_BITS)
