"""Weights of a model folder, read one tensor at a time in float32; knows no GGUF.

All floating-point dtypes of safetensors become float32 without loss (float64 is not taken).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.errors import ReleaseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class WeightFolder:
    """The tensors of a folder's safetensors files: name to (file, shape)."""

    folder: Path
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self.tensors[name][1]

    def load(self, name: str) -> NDArray[np.float32]:
        """Read one tensor as float32; error: `release.not-finite` names a tensor with NaN or infinity."""
        import torch
        from safetensors import safe_open

        with safe_open(self.folder / self.tensors[name][0], framework="pt") as file:
            values: NDArray[np.float32] = file.get_tensor(name).to(torch.float32).numpy()
        if not np.isfinite(values).all():
            hint = "train again: fedtune simulate, with a smaller training.learning_rate"
            raise ReleaseError("not-finite", f"{self.folder}: {name} holds NaN or infinity", hint=hint)
        return values


def open_weights(folder: Path, pattern: str = "*.safetensors") -> WeightFolder:
    """Find all tensors of a folder; errors: `release.no-weights`, `release.quantised-base`."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        for path in sorted(folder.glob(pattern)):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                    view = file.get_slice(name)
                    if view.get_dtype() not in _DTYPES:
                        raise _not_plain(path, name, view.get_dtype())
                    tensors[name] = (path.name, tuple(view.get_shape()))
    except (OSError, SafetensorError) as error:
        raise ReleaseError(
            "no-weights", f"{folder} cannot be read ({error})", hint="fetch or write it again"
        ) from error
    if not tensors:
        raise ReleaseError("no-weights", f"{folder} holds no {pattern}", hint="name a folder with safetensors weights")
    return WeightFolder(folder, tensors)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Read one JSON object of a folder; error: `release.no-config`."""
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReleaseError(
            "no-config", f"{folder / name} cannot be read as JSON", hint="name the whole folder"
        ) from error
    if not isinstance(config, dict):
        raise ReleaseError("no-config", f"{folder / name} is not a JSON object", hint="name the whole folder")
    return config


def _not_plain(path: Path, name: str, dtype: str) -> ReleaseError:
    return ReleaseError(
        "quantised-base",
        f"{path}: {name} is {dtype}; GGUF is written from {', '.join(_DTYPES)}",
        hint="merge into the unquantised base: fedtune release RUN --to merged",
    )
