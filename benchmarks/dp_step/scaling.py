"""Curves of fedtune's private step against B, T, r and the number of layers, and the cost model fitted to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.dp_step.configurations import Configuration
from benchmarks.dp_step.costs import Cost, cost

VARIED: Mapping[str, Sequence[int]] = {
    "batch": (4, 8, 16, 32),
    "tokens": (32, 64, 128, 256),
    "rank": (1, 8, 32, 64),
    "layers": (2, 4, 6, 12),
}
_QUICK: Mapping[str, Sequence[int]] = {"batch": (2, 4), "tokens": (8, 16)}
_SHORT = {"batch": "B", "tokens": "T", "rank": "r", "layers": "layers"}


def points(base: Configuration, *, quick: bool) -> list[tuple[str, int, Configuration]]:
    """Return what is varied, its value and the configuration, for each point of each curve; the base is one of them."""
    varied = _QUICK if quick else VARIED
    found = []
    for field, values in varied.items():
        for value in values:
            name = base.name if getattr(base, field) == value else f"{base.name}-{field}-{value}"
            change: dict[str, Any] = {field: value, "name": name}
            found.append((_SHORT[field], value, replace(base, **change)))
    return found


def predicted(shape: Configuration, rate: float) -> float:
    """Return milliseconds by the cost model at so many operations a second."""
    return 1e3 * _all(cost(shape)) / rate


def fitted_rate(measured: Sequence[tuple[Configuration, float]]) -> float:
    """Return the operations a second with the smallest relative errors (least squares) over measured milliseconds.

    A step of F operations is predicted to take F / rate. With speeds x = F / measured, Σ (x / rate − 1)² is least at
    rate = Σ x² / Σ x.
    """
    speeds = [1e3 * _all(cost(shape)) / milliseconds for shape, milliseconds in measured]
    return sum(speed**2 for speed in speeds) / sum(speeds)


def _all(found: Cost) -> int:
    return found.operations + found.extra_operations
