"""The adapter's tensors in canonical order: names, shapes and what each one is.

An adapter state is a mapping from canonical name to a float32 NumPy array. Knows neither torch nor PEFT, so that the
aggregation, the messages and the tests can speak of adapters without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["lora_A", "lora_B", "lora_R", "head"]
Array = NDArray[np.float32]
AdapterState = Mapping[str, Array]
INCREMENT: Final = "drift/"  # before the names of tensors of a state that are added to the base


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: `lora_A` is (rank, d_in), `lora_B` is (d_out, rank); `layer` joins the two.

    `lora_R` is the (rank, rank) core of `fedsb`; it belongs to no pair, so like a head it has no layer.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: str = ""

    @property
    def size(self) -> int:
        """How many numbers the tensor holds."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """All tensors of one adapter, sorted by name, so that every machine walks them in the same order."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.tensors]
        if names != sorted(set(names)):
            raise ValueError("adapter tensors must be unique and sorted by name")

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names in order."""
        return tuple(spec.name for spec in self.tensors)

    @property
    def size(self) -> int:
        """How many numbers the adapter holds."""
        return sum(spec.size for spec in self.tensors)

    @property
    def pairs(self) -> tuple[tuple[TensorSpec, TensorSpec], ...]:
        """The (A, B) specs of each adapted layer, in order of the layer's name."""
        factors: dict[str, dict[Role, TensorSpec]] = {}
        for spec in self.tensors:
            if spec.layer:
                factors.setdefault(spec.layer, {})[spec.role] = spec
        return tuple((pair["lora_A"], pair["lora_B"]) for _, pair in sorted(factors.items()))

    def without(self, role: Role) -> AdapterLayout:
        """Return the layout of everything but one role (frozen A is never sent)."""
        return AdapterLayout(tuple(spec for spec in self.tensors if spec.role != role))
