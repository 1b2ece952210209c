"""NumPy arrays as Flower arrays: raw little-endian bytes with a dtype and a shape, no pickle and no file format.

Knows nothing of adapters; `fedtune.flower.messages` decides which names may appear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fedtune.errors import MessageError

SERIALISATION = "fedtune.raw-le"
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "uint8": np.dtype("u1"),
}


def to_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Encode arrays under their names, in sorted order, so that equal content has equal bytes."""
    record = ArrayRecord()
    for name in sorted(arrays):
        record[name] = _encode(arrays[name])  # its constructor would build every array twice
    return record


def from_record(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Decode arrays as read-only views of the received bytes; anything that is not exactly right is refused."""
    return {name: _decode(name, array) for name, array in record.items()}


def payload_bytes(record: ArrayRecord) -> int:
    """Return the bytes of all arrays, without names and headers."""
    return sum(len(array.data) for array in record.values())


def _encode(value: NDArray[Any]) -> Array:
    kind = value.dtype.name
    little = np.ascontiguousarray(value, dtype=_DTYPES[kind])
    return Array(kind, tuple(value.shape), SERIALISATION, little.tobytes())


def _decode(name: str, array: Array) -> NDArray[Any]:
    dtype = _DTYPES.get(array.dtype)
    if array.stype != SERIALISATION or dtype is None:
        raise MessageError("wrong-dtype", f"array {name!r} is {array.stype}/{array.dtype}")
    if any(size < 0 for size in array.shape) or math.prod(array.shape) * dtype.itemsize != len(array.data):
        raise MessageError("wrong-shape", f"array {name!r} of shape {array.shape} has {len(array.data)} bytes")
    try:
        values: NDArray[Any] = np.frombuffer(array.data, dtype=dtype).reshape(array.shape)
    except (ValueError, OverflowError) as error:  # NumPy's own limits on dimensions and sizes
        raise MessageError("wrong-shape", f"array {name!r} has a shape that no array can have") from error
    return values
