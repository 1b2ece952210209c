"""Reads JSON that is written in its canonical form (RFC 8785) and refuses every other spelling of the same value.

Python's own encoder writes the canonical form but for three things: how it writes floats, how it sorts keys beyond the
basic plane, and that it takes NaN and whole numbers of any size. Each number is therefore checked by itself, and text
that is not ASCII, or that it writes differently, goes to the reference implementation, which is several times slower.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import rfc8785

_LARGEST = 2**53 - 1  # the whole numbers that a double holds


def read_canonical(raw: bytes) -> Any:
    """Return the value; ValueError (or RecursionError) for what is not the canonical form of any value."""
    value = _DECODER.decode(raw.decode())
    if raw.isascii() and _ENCODER.encode(value).encode() == raw:
        return value
    if rfc8785.dumps(value) != raw:
        raise ValueError("not in canonical form")
    return value


@lru_cache(maxsize=1024)
def _float(text: str) -> float:
    value = float(text)
    if rfc8785.dumps(value) != text.encode():
        raise ValueError(f"{text} is not how the number is written")
    return value


def _whole(text: str) -> int | float:
    value = int(text)
    return value if abs(value) <= _LARGEST else _float(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_float, parse_int=_whole, parse_constant=_refuse)
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
