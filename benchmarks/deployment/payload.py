"""An adapter of a given size: float32 matrices as LoRA has them, with random content.

Flower's object store keeps equal bytes once, so zeros would travel once, whatever the size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SHAPE = (64, 4096)  # rank 64 over 4,096 features: 1 MiB
Arrays = dict[str, NDArray[np.float32]]


def adapter(mebibytes: int, seed: int) -> Arrays:
    """Return so many matrices of 1 MiB under names that sort in their order."""
    random = np.random.default_rng(seed)
    return {f"layer.{number:04}.lora_A": random.standard_normal(SHAPE, np.float32) for number in range(mebibytes)}


def moved(arrays: dict[str, NDArray[np.float32]], step: float) -> Arrays:
    """Return other arrays of the same size, different for each site, and drop the given ones on the way."""
    return {name: arrays.pop(name) + np.float32(step) for name in list(arrays)}
