"""The geometric median by smoothed Weiszfeld iterations, in terms of inner products alone.

The point z that minimises F(z) = Σ pᵢ·‖z − uᵢ‖ is a mean Σ aᵢ·uᵢ, so only a (n,) is iterated, with Gᵢⱼ = ⟨uᵢ, uⱼ⟩:

    ‖z − uⱼ‖² = aᵀGa − 2·(Ga)ⱼ + Gⱼⱼ,   aⱼ ← (pⱼ / max(ν, ‖z − uⱼ‖)) / Σ …

An attacker at a distance L gets a weight of order 1/L, so its terms stay as small as the honest ones. Written with
squared distances instead of G the formula is the same, but terms of order L cancel in it, and an attacker that is far
enough away decides by rounding alone.

Distances below ν count as ν, which makes F smooth; F differs from the smooth one by at most ½·ν. ν and the stopping
rule are relative to the spread: the smallest radius of a ball around a site that holds more than half of all shares. A
minority can make the spread smaller but not larger than the honest sites' diameter.

Bound: with the attackers' share α < ½ and every honest update within R of some point c, ‖z − c‖ ≤ (2(1 − α)R + ½ν) /
(1 − 2α), plus what the stopping rule leaves. Source: RFA (arXiv 1912.13445).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregation.robust.geometry import squared_distances

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

SMOOTHING: Final = 1e-6  # ν as a part of the spread
TOLERANCE: Final = 1e-8  # the last move of z as a part of the spread
MOST_ITERATIONS: Final = 2_000
_TINY: Final = 1e-150  # ν where more than half of the sites are at one point


def geometric_median(
    gram: Matrix, shares: Vector, *, smoothing: float = SMOOTHING, tolerance: float = TOLERANCE
) -> Vector:
    """Return the weights a (n,), of sum 1, with which Σ aᵢ·uᵢ is the geometric median. O(n²) an iteration.

    It stops when z moves by less than `tolerance` times the spread, or after 2,000 iterations; F never rises, so an
    iteration that was stopped early is still a mean of updates that is no worse than the start, which is the mean of
    the majority that lies closest together. An even number of sites on one line has more than one median.
    """
    spread, weights = _closest_majority(squared_distances(gram), shares)
    nu = max(smoothing * spread, _TINY)
    for _ in range(MOST_ITERATIONS):
        pull = shares / np.maximum(nu, _distances_from(gram, weights))
        new = pull / pull.sum()
        moved = _length(gram, new - weights)
        weights = new
        if moved <= tolerance * spread:
            break
    return weights


def _closest_majority(distances: Matrix, shares: Vector) -> tuple[float, Vector]:
    """Return the smallest radius around a site that holds a majority, and the shares inside it alone."""
    sites = np.arange(len(shares))
    order = np.argsort(distances, axis=1, kind="stable")
    reached = np.argmax(np.cumsum(shares[order], axis=1) > (0.5 + 1e-9) * shares.sum(), axis=1)
    squares = distances[sites, order[sites, reached]]
    centre = int(squares.argmin())
    inside = np.where(distances[centre] <= squares[centre], shares, 0.0)
    return float(np.sqrt(squares[centre])), inside / inside.sum()


def _distances_from(gram: Matrix, weights: Vector) -> Vector:
    """Return ‖z − uⱼ‖ (n,) for z = Σ aᵢ·uᵢ."""
    to_each = gram @ weights
    return np.sqrt(np.maximum(float(weights @ to_each) - 2 * to_each + np.diag(gram), 0.0))


def _length(gram: Matrix, coefficients: Vector) -> float:
    """Return ‖Σ bᵢ·uᵢ‖."""
    return float(np.sqrt(max(0.0, float(coefficients @ gram @ coefficients))))
