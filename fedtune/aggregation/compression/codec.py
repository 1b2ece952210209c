"""What a site does to its update before it sends it, and the coordinator before it averages.

    d = state − reference (+ e)     the difference to the last global adapter, and what earlier rounds left out
    the k entries of d of largest magnitude, or all
    numbers in a `Format`
    e ← d − what the coordinator decodes

**Error feedback.** Top-k alone drops the same small entries every round and stops somewhere else than training would.
The residual e, float32 tensors that the site keeps, adds them up until they count (Stich et al., arXiv 1809.07599;
Karimireddy et al., arXiv 1901.09847).

Whether e is private follows from one thing: d has to be made *after* the noise. Then e is a function of noised updates
and of independent randomness, as the payload is, and neither costs privacy, whenever and however often e is added to a
later update. Residuals of sums before the noise would be another matter: what one round leaves out would enter a later
round's sum beside that round's clipped gradients, whose sensitivity the clip norm no longer bounds, and no accountant
here knows of it. So a state goes into `encode` only after `train_round`, where every step is noised. At the site, e is
to be kept as the optimiser's state is, encrypted: it tells about the site what its update would, and only what is sent
is meant to be seen.

e lives in the coordinates of what is sent. An algorithm that changes them between rounds (`fedsvd`, `flora`, `fedask`)
would add it to other directions than it came from, so it excludes feedback. Scales and positions differ from site to
site, so compressed updates cannot be summed under masks: no secure aggregation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedtune.aggregation.compression import indices
from fedtune.aggregation.compression.formats import LARGEST_FLOAT32, BFloat16, Float16, Float32, Format, Integers
from fedtune.aggregation.compression.payload import Bytes, Payload, checked
from fedtune.aggregation.compression.rounding import within
from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from fedtune.model.layout import AdapterLayout, AdapterState, Array
    from fedtune.privacy.random import RandomSource

Vector = NDArray[np.float32]
Memory = Mapping[str, NDArray[np.float32]]

POSITIONS: Final = "positions"
RESIDUAL: Final = "residual/"
FORMATS: Final[Mapping[str, Format]] = {
    "fp32": Float32(),
    "fp16": Float16(),
    "bf16": BFloat16(),
    "int8": Integers(8),
    "int4": Integers(4),
}


@dataclass(frozen=True, slots=True)
class Codec:
    """One compression, the same at every site and at the coordinator because it stands in the plan.

    `keep` is the part of all entries that is sent, in (0, 1]; 1 sends all, without positions. `feedback` keeps what
    was not sent. Error: `bad-compression`.
    """

    format: Format
    keep: float = 1.0
    feedback: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise AggregationError(
                "bad-compression", f"compression cannot keep {self.keep} of an update", hint="keep more than 0, up to 1"
            )

    def kept(self, layout: AdapterLayout) -> int:
        """Return k, how many of the layout's P numbers are sent: ⌈keep·P⌉."""
        return math.ceil(self.keep * layout.size)

    def lengths(self, layout: AdapterLayout) -> dict[str, int]:
        """Return the names and bytes of what is sent, known from the plan alone."""
        positions = {POSITIONS: indices.encoded_length(self.kept(layout), layout.size)} if self.keep < 1 else {}
        return {**positions, **self.format.lengths(self._sizes(layout))}

    def encode(
        self,
        state: AdapterState,
        reference: AdapterState,
        layout: AdapterLayout,
        memory: Memory,
        source: RandomSource,
    ) -> tuple[Payload, dict[str, Array]]:
        """Return the compressed difference, and the memory to keep for the site's next update.

        `reference` is the global adapter the site received. `memory` is empty before the first update; residuals of
        tensors that this layout does not send stay in it. The new memory counts from when the coordinator has the
        payload; after a round that was lost or is repeated the old one does.

        Deterministic given the source's stream. Errors: `not-finite`, `wrong-state`.
        """
        difference = _difference_of(state, reference, layout, memory if self.feedback else {})
        chosen = None if self.keep == 1 else largest(difference, self.kept(layout))
        sent = difference if chosen is None else difference[chosen]
        arrays = self.format.encode(sent, self._sizes(layout), source)
        if chosen is not None:
            arrays = {POSITIONS: indices.encode(chosen, layout.size), **arrays}
        if not self.feedback:
            return Payload(arrays), dict(memory)
        left = _unflatten(difference - self._difference(arrays, layout), layout)
        return Payload(arrays), {**memory, **{RESIDUAL + name: part for name, part in left.items()}}

    def decode(self, payload: Payload, reference: AdapterState, layout: AdapterLayout) -> dict[str, Array]:
        """Return reference + difference as float32 tensors of the layout; what is sent still has to be validated.

        Errors: those of `checked`, `message.wrong-encoding` for bytes that no encoder writes, and `not-finite` where
        the sum leaves float32's range.
        """
        difference = self._difference(checked(payload, self.lengths(layout)), layout)
        with np.errstate(over="ignore"):
            state = _flatten(reference, layout) + difference
        if not np.isfinite(state).all():
            raise AggregationError("not-finite", "a compressed update leaves float32's range")
        return _unflatten(state, layout)

    def _difference(self, arrays: Mapping[str, Bytes], layout: AdapterLayout) -> Vector:
        """Return what the bytes stand for (P,)."""
        numbers = self.format.decode(arrays, self._sizes(layout))
        if self.keep == 1:
            return numbers
        difference = np.zeros(layout.size, np.float32)
        difference[indices.decode(arrays[POSITIONS], self.kept(layout), layout.size)] = numbers
        return difference

    def _sizes(self, layout: AdapterLayout) -> tuple[int, ...]:
        """Return the runs in which numbers are written: tensor by tensor, or all that were chosen in one."""
        return tuple(spec.size for spec in layout.tensors) if self.keep == 1 else (self.kept(layout),)


def make_codec(values: str, keep: float = 1.0, *, feedback: bool = False) -> Codec:
    """Return the codec of a format's name; `unknown-compression` names those there are."""
    if values not in FORMATS:
        raise AggregationError(
            "unknown-compression", f"there is no format {values!r}", hint=f"use one of {', '.join(FORMATS)}"
        )
    return Codec(FORMATS[values], keep, feedback)


def largest(vector: Vector, count: int) -> NDArray[np.int64]:
    """Return where the `count` entries of largest magnitude are, ascending; of equal ones the first."""
    magnitude = np.abs(vector)
    threshold = np.partition(magnitude, vector.size - count)[vector.size - count]
    above = np.flatnonzero(magnitude > threshold)
    equal = np.flatnonzero(magnitude == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal])).astype(np.int64)


def _flatten(state: AdapterState, layout: AdapterLayout) -> Vector:
    """Return the layout's tensors as one vector."""
    parts = []
    for spec in layout.tensors:
        array = state.get(spec.name)
        if array is None or array.shape != spec.shape or array.dtype != np.float32:
            raise AggregationError("wrong-state", f"tensor {spec.name} is missing or not float32 {spec.shape}")
        parts.append(array.reshape(-1))
    return np.concatenate(parts)


def _unflatten(vector: Vector, layout: AdapterLayout) -> dict[str, Array]:
    ends = np.cumsum([spec.size for spec in layout.tensors])
    parts = np.split(vector, ends[:-1])
    return {spec.name: part.reshape(spec.shape) for spec, part in zip(layout.tensors, parts, strict=True)}


def _difference_of(state: AdapterState, reference: AdapterState, layout: AdapterLayout, memory: Memory) -> Vector:
    """Return state − reference + residual (P,), finite."""
    residual = {
        spec.name: memory.get(RESIDUAL + spec.name, np.zeros(spec.shape, np.float32)) for spec in layout.tensors
    }
    with np.errstate(over="ignore", invalid="ignore"):
        difference = _flatten(state, layout) - _flatten(reference, layout) + _flatten(residual, layout)
    within(difference, LARGEST_FLOAT32, "float32")
    return difference
