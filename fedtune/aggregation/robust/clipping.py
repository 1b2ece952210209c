"""Norm clipping around the last global adapter: no update counts with more than a threshold's length.

    g + Σ pᵢ·cᵢ·(uᵢ − g) = Σ pᵢ·cᵢ·uᵢ + (1 − Σ pᵢ·cᵢ)·g,   cᵢ = min(1, τ / ‖uᵢ − g‖)

Attackers with share α move the result by at most α·τ from where the others would bring it; how many there are does not
matter, but nothing pulls the result back either. Not the clipping of gradients under DP, and no substitute for it.

Sources: a fixed τ, Sun et al. (arXiv 1911.07963); centred on the last aggregate, Karimireddy et al. (arXiv 2012.10333).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def clip_factors(norms: Vector, threshold: float | None = None) -> Vector:
    """Return cᵢ (n,) in (0, 1] for norms ‖uᵢ − g‖ (n,); O(n) beside the norms.

    The threshold is the median of the norms when None: with f < n/2 attackers it is at most the longest honest update,
    and attackers can at best make it the shortest. A zero threshold keeps zero updates and drops the others.
    """
    tau = float(np.median(norms)) if threshold is None else threshold
    longer = norms > tau
    return np.where(longer, tau / np.where(longer, norms, 1.0), 1.0)
