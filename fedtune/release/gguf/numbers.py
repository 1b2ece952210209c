"""Number formats of GGUF: which a tensor gets, how many bytes it takes, and its values in that format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from fedtune.errors import ReleaseError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray

Dtype = Literal["f32", "f16", "q8_0"]
_BLOCK = 32  # q8_0 shares one scale between 32 neighbours of a row
_F16_MAX = 65504.0


def check_dtype(dtype: str) -> Dtype:
    """Return a known dtype; error: `release.unknown-dtype`."""
    for known in get_args(Dtype):
        if dtype == known:
            return known  # type: ignore[no-any-return] # get_args forgets that these are the literals
    known_all = ", ".join(get_args(Dtype))
    raise ReleaseError("unknown-dtype", f"GGUF is not written in {dtype}", hint=f"choose one of {known_all}")


def format_of(name: str, shape: tuple[int, ...], dtype: Dtype) -> Dtype:
    """Return a tensor's format: vectors and GPT-2's positions stay f32; rows that 32 does not divide fall to f16."""
    if len(shape) == 1 or name.startswith("position_embd"):
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % _BLOCK else dtype


def quantization(kind: Dtype) -> GGMLQuantizationType:
    """Return the package's constant for a format."""
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def byte_count(shape: tuple[int, ...], kind: Dtype) -> int:
    """Return how many bytes a tensor takes."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[quantization(kind)]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def encode(values: NDArray[np.float32], kind: Dtype, name: str) -> NDArray[np.generic]:
    """Return the values in a format; error: `release.out-of-range` where half precision would become infinite."""
    import gguf

    largest = float(np.abs(values).max(initial=0.0))
    if kind == "f16" and largest > _F16_MAX:
        raise ReleaseError(
            "out-of-range",
            f"{name} holds {largest:g}, more than half precision can (65504)",
            hint="fedtune release RUN --to gguf --dtype f32",
        )
    encoded: NDArray[np.generic] = gguf.quantize(np.ascontiguousarray(values), quantization(kind))
    return encoded
