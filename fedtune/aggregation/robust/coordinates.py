"""Rules that look at each entry by itself: the coordinate-wise median, trimmed mean, and mean around the median.

All act on rows (n, P), one a site, and return (P,) in float64. They sort each column, so any order of the rows gives
the same bits. With f < n/2 attackers each entry of the median and of the trimmed mean lies between the smallest and the
largest honest value of that entry; the vector as a whole may still be one that no site would send.

Knows no site and no adapter. Meaningful only where ΔW is linear in the entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


def median(rows: Matrix) -> Vector:
    """Return the median of each column, for even n the mean of the two middle values. O(P·n·log n).

    Breakdown: f < n/2. Source: Yin et al. (arXiv 1803.01498).
    """
    ordered = _sorted(rows)
    return _middle(ordered)


def trimmed_mean(rows: Matrix, attackers: int) -> Vector:
    """Return the mean of each column without its f smallest and f largest values, n > 2f. O(P·n·log n).

    The paper's β is f/n. f = 0 gives the plain mean. Breakdown: f < n/2. Source: Yin et al. (arXiv 1803.01498).
    """
    ordered = _sorted(rows)
    kept: Vector = ordered[attackers : len(rows) - attackers].mean(axis=0)
    return kept


def mean_around_median(rows: Matrix, keep: int) -> Vector:
    """Return the mean of the `keep` values of each column that are closest to its median: Bulyan's second phase.

    Of two values at the same distance the smaller is the closer one.
    """
    ordered = _sorted(rows)
    nearest = np.argsort(np.abs(ordered - _middle(ordered)), axis=0, kind="stable")[:keep]
    kept: Vector = np.take_along_axis(ordered, np.sort(nearest, axis=0), axis=0).mean(axis=0)
    return kept


def _sorted(rows: Matrix) -> Matrix:
    """Sort each column; -0 becomes 0, or which of the two stands in the middle would depend on who was quick."""
    return np.sort(rows + 0.0, axis=0)


def _middle(ordered: Matrix) -> Vector:
    n = len(ordered)
    middle: Vector = 0.5 * ordered[(n - 1) // 2] + 0.5 * ordered[n // 2]
    return middle
