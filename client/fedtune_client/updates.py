"""The bytes of an update: what is committed, kept in the vault and sent again, one spelling for one update.

A safetensors file whose metadata holds the header. Knows no journal and no message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedtune.privacy.accounting import Event

Arrays = Mapping[str, NDArray[Any]]
_HEADER = "fedtune"


@dataclass(frozen=True, slots=True)
class Payload:
    """What a round produced: the arrays that are sent, and all events the site has spent on the study by then."""

    arrays: Arrays
    events: tuple[Event, ...]

    def to_bytes(self) -> bytes:
        """Return the one file of this payload: arrays by name, events in their order."""
        arrays = {name: np.ascontiguousarray(self.arrays[name]) for name in sorted(self.arrays)}
        header = json.dumps([event.to_dict() for event in self.events], sort_keys=True, separators=(",", ":"))
        return save(arrays, metadata={_HEADER: header})

    @classmethod
    def from_bytes(cls, data: bytes) -> Payload:
        """Read what `to_bytes` wrote; the vault has checked that nobody changed it."""
        header_size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_size])["__metadata__"][_HEADER]
        return cls(load(data), tuple(Event.from_dict(event) for event in json.loads(header)))


def digest(data: bytes) -> str:
    """Return the SHA-256 of bytes in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_of(arrays: Arrays) -> str:
    """Return the SHA-256 of named arrays: names, types, shapes and numbers."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name}\n{array.dtype.str}\n{array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def as_bytes(data: bytes) -> NDArray[np.uint8]:
    """Return bytes as an array that can be kept among others."""
    return np.frombuffer(data, np.uint8)
