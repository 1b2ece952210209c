"""One spelling for one JSON value, so that equal plans have equal hashes.

Close to RFC 8785 (JSON Canonicalization Scheme): keys sorted, no spaces, UTF-8, floats in their shortest form that
reads back exactly. It differs in three points, all in favour of Python's exact round trip:

- keys are sorted by code point, not by UTF-16 unit (they differ only beyond U+FFFF);
- a float keeps its point or exponent as Python writes it (`1.0`, `1e-07`), so 1 and 1.0 remain two values, and -0.0
  keeps its sign;
- an integer is exact at any size.

Knows no plan and no file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from fedtune.errors import ConfigError


def canonical_json(value: Any) -> str:
    """Return the canonical text of a JSON value; tuples are arrays.

    `canonical_json(a) == canonical_json(b)` exactly if a and b are the same value with the same types, whatever the
    order of their keys, and `json.loads` gives the value back.

    Raises ConfigError `not-canonical` with the path of what JSON cannot say: NaN, an infinity, a key that is not text,
    a lone surrogate, an object of another type.
    """
    _require_json(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_hex(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, 64 lower-case hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _require_json(value: Any, path: str) -> None:
    if isinstance(value, str):
        _require_utf8(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _not_canonical(path, f"{value} is not a number of JSON")
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise _not_canonical(path, f"the key {key!r} is not text")
            _require_utf8(key, path)
            _require_json(entry, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for position, entry in enumerate(value):
            _require_json(entry, f"{path}[{position}]")
    elif value is not None and not isinstance(value, bool | int):
        raise _not_canonical(path, f"a {type(value).__name__} has no form in JSON")


def _require_utf8(text: str, path: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _not_canonical(path, "text with a lone surrogate has no form in UTF-8") from None


def _not_canonical(path: str, problem: str) -> ConfigError:
    return ConfigError("not-canonical", f"{path}: {problem}", hint="a plan holds text, finite numbers, lists, mappings")
