"""What a compressed update is on the wire: named arrays of bytes. Nothing here trusts their sender."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import MessageError

Bytes = NDArray[np.uint8]

_SHOWN: Final = 80  # characters of a name that another machine chose


@dataclass(frozen=True, slots=True)
class Payload:
    """One-dimensional uint8 arrays by name; all multi-byte numbers in them are little-endian."""

    arrays: Mapping[str, NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, without names and headers: what `flower.arrays.payload_bytes` counts."""
        return sum(array.nbytes for array in self.arrays.values())


def checked(payload: Payload, lengths: Mapping[str, int]) -> dict[str, Bytes]:
    """Return the arrays of exactly these names and lengths in bytes.

    Errors: `message.missing-key`, `message.unknown-key`, `message.wrong-dtype`, `message.wrong-shape`.
    """
    for name in payload.arrays:
        if name not in lengths:
            raise MessageError("unknown-key", f"array {name!r:.{_SHOWN}} is not part of this compressed update")
    return {name: _bytes(payload, name, length) for name, length in lengths.items()}


def refuse(found: str) -> MessageError:
    """Return the refusal of bytes that no encoder writes."""
    return MessageError("wrong-encoding", f"a compressed update {found}")


def _bytes(payload: Payload, name: str, length: int) -> Bytes:
    array = payload.arrays.get(name)
    if array is None:
        raise MessageError("missing-key", f"array {name} is missing")
    if array.dtype != np.uint8:
        raise MessageError("wrong-dtype", f"array {name} is not uint8")
    if array.shape != (length,):
        raise MessageError("wrong-shape", f"array {name} has shape {array.shape}, not ({length},)")
    return array
