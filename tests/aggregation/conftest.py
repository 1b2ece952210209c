"""Adapters of awkward shapes: wide, tall, square, and with a rank above both sides."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings

from fedtune.model.layout import AdapterLayout, AdapterState, TensorSpec

settings.register_profile("untimed", deadline=None)  # a first example that imports a library is not a failure
settings.load_profile("untimed")

Dims = tuple[int, int, int]
AWKWARD: dict[str, Dims] = {  # (rank, d_in, d_out)
    "h.0.wide": (3, 11, 5),
    "h.1.tall": (2, 4, 9),
    "h.2.square": (4, 6, 6),
    "h.3.overranked": (6, 7, 3),
}


def layout_of(layers: dict[str, Dims], head: tuple[int, ...] | None = (3, 5)) -> AdapterLayout:
    specs = []
    for layer, (rank, d_in, d_out) in layers.items():
        specs.append(TensorSpec(f"{layer}.lora_A.weight", (rank, d_in), "lora_A", layer))
        specs.append(TensorSpec(f"{layer}.lora_B.weight", (d_out, rank), "lora_B", layer))
    if head is not None:
        specs.append(TensorSpec("score.weight", head, "head"))
    return AdapterLayout(tuple(sorted(specs, key=lambda spec: spec.name)))


def random_state(layout: AdapterLayout, seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {spec.name: (scale * generator.standard_normal(spec.shape)).astype(np.float32) for spec in layout.tensors}


def update_of(layout: AdapterLayout, state: AdapterState) -> dict[str, np.ndarray]:
    """The dense B·A of each layer, in float64, written without the code under test."""
    return {
        spec_b.layer: np.einsum("or,ri->oi", state[spec_b.name].astype(float), state[spec_a.name].astype(float))
        for spec_a, spec_b in layout.pairs
    }


@pytest.fixture(scope="session")
def layout() -> AdapterLayout:
    return layout_of(AWKWARD)


@pytest.fixture(scope="session")
def make_layout() -> Callable[..., AdapterLayout]:
    return layout_of


@pytest.fixture(scope="session")
def make_state() -> Callable[..., dict[str, np.ndarray]]:
    return random_state


@pytest.fixture(scope="session")
def updates() -> Callable[..., dict[str, np.ndarray]]:
    return update_of
