"""Confidence intervals of what was measured on held-out records."""

from __future__ import annotations

import math

LEVEL = 0.95
_Z = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(share: float, count: int, z: float = _Z) -> tuple[float, float]:
    """Return the 95 % score interval of a share p of n independent records (Wilson 1927).

    (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n). It stays in [0, 1] and is not empty at p = 0 or 1; a ValueError
    for n < 1 or p outside [0, 1].
    """
    if count < 1 or not 0 <= share <= 1:
        raise ValueError(f"{share} of {count} is no share of records")
    width = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = ((share + z**2 / (2 * count) + sign * width) / (1 + z**2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)
