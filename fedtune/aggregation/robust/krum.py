"""Krum, Multi-Krum and the selection phase of Bulyan: which updates have the most company.

The score of update i is the sum of squared distances to its n − f − 2 nearest others. Functions of the squared
distances D (n, n) alone, so they act on flat updates and in product space alike and do not depend on where the origin
is. With few neighbours, two updates that are each other's nearest tie: the one with the smaller sum over all others
comes first, then the one whose site does. Bounds, with S the largest score among honest sites:

- whatever is chosen has a score of at most S (Krum: of at most the smallest honest score), and an honest update among
  its neighbours, so it lies within √(S / (n − 2f − 1)) of one. Attackers can choose where inside, not leave it.
- S ≤ (n − f − 2)·d² with d the honest sites' diameter.

Krum returns one site's update, which under DP carries that site's whole noise; Multi-Krum averages it down.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregation.robust.traits import check_sites
from fedtune.errors import AggregationError

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


def krum(distances: Matrix, attackers: int) -> int:
    """Return which update has the smallest score, n ≥ 2f + 3. O(n²·log n) beside the distances.

    Source: Blanchard et al. (arXiv 1703.02757).
    """
    check_sites("krum", len(distances), attackers)
    return int(_ranked(distances, attackers)[0])


def multi_krum(distances: Matrix, attackers: int, chosen: int | None = None) -> list[int]:
    """Return the m updates of smallest score in ascending order, n ≥ 2f + 3 and 1 ≤ m ≤ n − f; their mean is meant.

    m = `chosen`, n − f when None: then f = 0 is the plain mean, and m = 1 is Krum. The module's bound holds for every
    m ≤ n − f; the papers prove convergence for m ≤ n − f − 2 (arXiv 1905.04374). Error: `bad-selection`.
    """
    n = len(distances)
    check_sites("multi_krum", n, attackers)
    m = n - attackers if chosen is None else chosen
    if not 1 <= m <= n - attackers:
        raise AggregationError(
            "bad-selection",
            f"Multi-Krum cannot average {m} of {n} sites with {attackers} attackers",
            hint=f"choose 1 to {n - attackers} sites",
        )
    return sorted(_ranked(distances, attackers)[:m].tolist())


def bulyan_selection(distances: Matrix, attackers: int) -> list[int]:
    """Return Bulyan's θ = n − 2f updates in ascending order, n ≥ 4f + 3: Krum again and again among those left.

    Krum among m that are left sums m − f − 2 distances, and one where that would be none. O(n³·log n).
    Source: El Mhamdi et al. (arXiv 1802.07927).
    """
    n = len(distances)
    check_sites("bulyan", n, attackers)
    left, selected = list(range(n)), list[int]()
    while len(selected) < n - 2 * attackers:
        best = _ranked(distances[np.ix_(left, left)], attackers)[0]
        selected.append(left.pop(best))
    return sorted(selected)


def scores(distances: Matrix, attackers: int) -> Vector:
    """Return each update's Krum score (n,)."""
    n = len(distances)
    neighbours = min(max(1, n - attackers - 2), n - 1)
    ordered = np.sort(distances + np.diag(np.full(n, np.inf)), axis=1)
    total: Vector = ordered[:, :neighbours].sum(axis=1)
    return total


def _ranked(distances: Matrix, attackers: int) -> NDArray[np.intp]:
    """Return the updates from the smallest score to the largest."""
    return np.lexsort((distances.sum(axis=1), scores(distances, attackers)))


def equal_weights(selected: Sequence[int], sites: int) -> Vector:
    """Return 1 / m at each of the m selected sites and 0 elsewhere, (n,)."""
    weights = np.zeros(sites)
    weights[list(selected)] = 1 / len(selected)
    return weights
