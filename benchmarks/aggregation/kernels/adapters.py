"""Adapters of square layers with random numbers, as replies that were just decoded: float32, no head."""

from __future__ import annotations

import numpy as np

from fedtune.model.layout import AdapterLayout, Array, TensorSpec


def layout_of(*, layers: int, side: int, rank: int) -> AdapterLayout:
    """Return the layout of so many layers (side, side) at one rank."""
    specs = []
    for layer in (f"layer.{number:04d}" for number in range(layers)):
        specs.append(TensorSpec(f"{layer}.lora_A.weight", (rank, side), "lora_A", layer))
        specs.append(TensorSpec(f"{layer}.lora_B.weight", (side, rank), "lora_B", layer))
    return AdapterLayout(tuple(specs))


def random_state(layout: AdapterLayout, seed: int) -> dict[str, Array]:
    """Return uniform numbers within ±0.01."""
    generator = np.random.default_rng(seed)
    return {
        spec.name: generator.random(spec.shape, np.float32) * np.float32(0.02) - np.float32(0.01)
        for spec in layout.tensors
    }
