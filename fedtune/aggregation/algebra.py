"""Linear algebra of low-rank updates ΔW = B·A with B (d_out, r) and A (r, d_in), in float64, without ever forming ΔW.

Every pair (B·M⁻¹, M·A) is the same update. The functions here choose the pair whose A has orthonormal rows and whose B
has orthogonal columns of falling length, so that noise on B costs the same in every direction of W.

Knows no adapter, no layer name, no scale alpha / r (a constant factor that no function here touches) and no storage
order: `transformers`' `Conv1D` keeps W0 as (d_in, d_out), but PEFT's factors of it have the shapes above all the same.
"""

# ruff: noqa: N803, N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Matrix = NDArray[np.float64]
Factor = NDArray[np.floating[Any]]


def product(A: Factor, B: Factor) -> Matrix:
    """Return the update B·A, dense (d_out, d_in) float64: for tests and small layers."""
    return _wide(B) @ _wide(A)


def thin_refactor(A: Factor, B: Factor) -> tuple[Matrix, Matrix]:
    """Return (A', B') with B'·A' = B·A, orthonormal rows in A' and orthogonal columns of falling norm in B'.

    With Aᵀ = Q·R and B·Rᵀ = U·Σ·Vᵀ: A' = Vᵀ·Qᵀ and B' = U·Σ. The cost is O((d_out + d_in)·r²); ΔW is never formed.

    - A zero or rank-deficient B still gives r orthonormal rows, and the rows of A' always span those of A: what B could
      reach before, B' can reach after.
    - r > d_in has room for d_in orthonormal rows only; the rows of A' and columns of B' after those are zero.
    - Signs: the entry of largest magnitude in each row of A' is positive, so equal input gives equal output.

    Source: FedSVD (arXiv 2505.12805), there by an SVD of the dense ΔW.
    """
    return best_rank([A], [B], [1.0], A.shape[0])


def best_rank(As: Sequence[Factor], Bs: Sequence[Factor], weights: Sequence[float], rank: int) -> tuple[Matrix, Matrix]:
    """Return (A', B') of `rank` whose product is nearest to M = Σ wᵢ·Bᵢ·Aᵢ in the Frobenius norm.

    Thin QR of the stacked factors [B₁ … B_K] and [w₁A₁; …; w_KA_K], then the SVD of a matrix of at most (Σrᵢ, Σrᵢ).
    Exact, so B'·A' = M, when M has no more than `rank` singular values above zero (Eckart and Young, 1936). A' and B'
    have the form that `thin_refactor` describes.
    """
    stacked_A = np.concatenate([w * _wide(A) for w, A in zip(weights, As, strict=True)])
    q_in, r_in = np.linalg.qr(stacked_A.T)
    q_out, r_out = np.linalg.qr(np.concatenate([_wide(B) for B in Bs], axis=1))
    core = r_out @ r_in.T
    # All right singular vectors, also those of zero singular values: they complete A' to `rank` rows.
    directions = np.linalg.svd(core, full_matrices=True)[2][:rank]
    directions *= _signs(directions @ q_in.T)
    missing = rank - len(directions)
    new_A = np.pad(directions @ q_in.T, ((0, missing), (0, 0)))
    new_B = np.pad(q_out @ (core @ directions.T), ((0, 0), (0, missing)))
    return new_A, new_B


def basis_change(A: Factor, new_A: Factor) -> Matrix:
    """Return S (r, r') with X·A = (X·S)·A' for every X (d_out, r), given orthonormal rows in A' that span those of A.

    S = A·A'ᵀ. It carries whatever lives in B's coordinates, such as a server optimiser's momentum, along to B'.
    """
    return _wide(A) @ _wide(new_A).T


def _wide(factor: Factor) -> Matrix:
    return np.asarray(factor, dtype=np.float64)


def _signs(rows: Matrix) -> Matrix:
    """Return ±1 a row, (rows, 1): the sign of the row's entry of largest magnitude, +1 for a zero row."""
    leading = np.take_along_axis(rows, np.abs(rows).argmax(axis=1, keepdims=True), axis=1)
    return np.where(leading < 0, -1.0, 1.0)
