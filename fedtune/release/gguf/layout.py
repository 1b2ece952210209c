"""How llama.cpp lays out a weight: rotary pairs, shifted norms, transposed layers. Pure functions of arrays.

Shapes are NumPy's (rows, columns); GGUF names the same memory by its axes in reverse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedtune.release.gguf.families import Family
    from fedtune.release.gguf.hyperparameters import Hyperparameters


def pair_rotary(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder the rows of each head from halves (i, i + d/2) to neighbours (2i, 2i + 1), the pairs that RoPE turns.

    `rows` is (heads · d, …): a weight, a bias, or LoRA's B, since (ΠW)x = Π(Wx) and Π(BA) = (ΠB)A.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def rotary_heads(name: str, family: Family, sizes: Hyperparameters) -> int | None:
    """Return how many heads a GGUF tensor's rows are, if they must be paired; None for all others."""
    if not family.permutes:
        return None
    module = name.split(".")[2] if name.startswith("blk.") else ""
    return {"attn_q": sizes.heads, "attn_k": sizes.key_value_heads}.get(module)


def lay_out(name: str, values: NDArray[np.float32], family: Family, sizes: Hyperparameters) -> NDArray[np.float32]:
    """Return a weight or bias of `transformers` as llama.cpp multiplies by it; `name` is the GGUF name."""
    if (heads := rotary_heads(name, family, sizes)) is not None:
        return pair_rotary(values, heads)
    if family.shifts_norm and name.endswith("norm.weight"):
        return values + np.float32(1.0)
    if stored_transposed(name, family):
        return np.ascontiguousarray(values.T)
    return values


def stored_transposed(name: str, family: Family) -> bool:
    """Return whether `transformers` stores this layer (in, out): GPT-2's Conv1D."""
    return family.transposes and name.startswith("blk.") and name.endswith(".weight") and "norm" not in name
