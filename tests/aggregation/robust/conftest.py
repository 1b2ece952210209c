"""Clouds of flat updates, honest sites of an adapter, and squared distances by independent loops."""

from collections.abc import Callable

import numpy as np
import pytest

from fedtune.model.layout import AdapterLayout

State = dict[str, np.ndarray]


def cloud_of(sites: int, size: int, seed: int, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((sites, size))


def distances_of(rows: np.ndarray) -> np.ndarray:
    """Squared distances, one pair after the other."""
    return np.array([[sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) for other in rows] for one in rows])


def trained_sites(layout: AdapterLayout, centre: State, sites: int, seed: int = 1) -> list[State]:
    """Honest sites: a common step of length ~1 an entry, and a fifth of it of their own."""
    generator = np.random.default_rng(seed)
    step = {spec.name: generator.standard_normal(spec.shape) for spec in layout.tensors}
    return [
        {
            name: (centre[name] + step[name] + 0.2 * generator.standard_normal(step[name].shape)).astype(np.float32)
            for name in layout.names
        }
        for _ in range(sites)
    ]


def flattened(state: State) -> np.ndarray:
    return np.concatenate([state[name].ravel().astype(float) for name in sorted(state)])


@pytest.fixture(scope="session")
def make_cloud() -> Callable[..., np.ndarray]:
    return cloud_of


@pytest.fixture(scope="session")
def distances() -> Callable[[np.ndarray], np.ndarray]:
    return distances_of


@pytest.fixture(scope="session")
def make_sites() -> Callable[..., list[State]]:
    return trained_sites


@pytest.fixture(scope="session")
def flat() -> Callable[[State], np.ndarray]:
    return flattened
