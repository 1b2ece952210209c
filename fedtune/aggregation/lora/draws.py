"""What every machine draws alike from the study's seed: fresh factors, frozen bases, sketches.

Nothing here is private and nothing hides anything: whoever knows the plan can draw the same. Each draw is named by the
algorithm, the round and the tensor, so that no two of them are the same stream.
"""

# ruff: noqa: N802
# A, B and Ω are the names in the papers.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedtune.model.layout import TensorSpec
from fedtune.privacy.random import SeededSource

Matrix = NDArray[np.float64]


def uniform_A(spec: TensorSpec, seed: int, purpose: str, number: int) -> NDArray[np.float32]:
    """Return an A (rank, d_in) of independent uniforms within ±1/√d_in: PEFT's own start of A."""
    source = SeededSource(purpose, seed, number, spec.name)
    drawn = np.asarray((2.0 * source.uniform(spec.size) - 1.0) / np.sqrt(spec.shape[1]), np.float32)
    return drawn.reshape(spec.shape)


def orthonormal(spec: TensorSpec, seed: int, purpose: str) -> NDArray[np.float32]:
    """Return a factor of uniformly random orthonormal rows or columns, whichever there are fewer of."""
    tall = SeededSource(purpose, seed, spec.name).normal(spec.size).reshape(max(spec.shape), min(spec.shape))
    basis, upper = np.linalg.qr(tall)
    basis = (basis * np.where(np.diag(upper) < 0, -1.0, 1.0)).astype(np.float32)  # one QR has a positive diagonal
    return np.ascontiguousarray(basis if basis.shape == spec.shape else basis.T)


def gaussian_sketch(d_in: int, width: int, seed: int, number: int, layer: str) -> Matrix:
    """Return Ω (d_in, width) of independent standard normals, equal on all machines up to the last bits."""
    return SeededSource("fedask", seed, number, layer).normal(d_in * width).reshape(d_in, width)
