"""Layouts and factors of one rank in terms of another, and the scale that keeps an update the same across ranks.

W = W0 + s·B·A with one s for the whole study. PEFT computes s = alpha / rank, so a site of another rank needs another
alpha (`alpha_at`); with the plan's alpha its update would arrive rank-for-rank too long or too short, silently.
"""

# ruff: noqa: N803
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.model.layout import AdapterLayout, TensorSpec

Array = NDArray[np.floating[Any]]
State = Mapping[str, Array]
Factors = tuple[Array, Array]  # (A, B)


def alpha_at(alpha: float, rank: int, own_rank: int) -> float:
    """Return the `lora_alpha` with which PEFT gives rank `own_rank` the study's scale s = alpha / rank."""
    return alpha * own_rank / rank


def at_rank(layout: AdapterLayout, rank: int) -> AdapterLayout:
    """Return the layout of the same layers and head with every adapter at `rank`."""
    return AdapterLayout(tuple(_at_rank(spec, rank) for spec in layout.tensors))


def fit_rank(A: Array, B: Array, rank: int) -> Factors:
    """Return (A', B') with the first `rank` rows of A and columns of B, zeros after those there are.

    Padding keeps B·A. Cutting drops Σ bⱼ·aⱼ over the rows that are cut: the best choice of that rank in the Frobenius
    norm where A has orthonormal rows and B orthogonal columns of falling norm, as `algebra.best_rank` returns them.
    """
    missing = max(0, rank - A.shape[0])
    return np.pad(A[:rank], ((0, missing), (0, 0))), np.pad(B[:, :rank], ((0, 0), (0, missing)))


def only(layout: AdapterLayout, *roles: str) -> AdapterLayout:
    """Return the layout of the tensors of these roles."""
    return AdapterLayout(tuple(spec for spec in layout.tensors if spec.role in roles))


def nothing() -> AdapterLayout:
    """Return the layout of no tensor."""
    return AdapterLayout(())


def plain(name: str, shape: tuple[int, ...]) -> TensorSpec:
    """Return the spec of a tensor that is neither factor: like a head it is averaged as it is, and has no rank."""
    return TensorSpec(name, shape, "head")


def select(state: State, layout: AdapterLayout) -> dict[str, Array]:
    """Return the tensors of a layout, in its order."""
    return {name: state[name] for name in layout.names}


def rounded(wide: Array, *, like: Array) -> Array:
    """Round a float64 result to how a state keeps it: float64 beside float64, float32 beside anything shorter."""
    return np.asarray(wide, np.float64 if like.dtype == np.float64 else np.float32)


def rounded_pair(pair: Factors, *, like: Array) -> Factors:
    """Round both factors."""
    return rounded(pair[0], like=like), rounded(pair[1], like=like)


def _at_rank(spec: TensorSpec, rank: int) -> TensorSpec:
    if spec.role == "lora_A":
        return replace(spec, shape=(rank, spec.shape[1]))
    return replace(spec, shape=(spec.shape[0], rank)) if spec.role == "lora_B" else spec
