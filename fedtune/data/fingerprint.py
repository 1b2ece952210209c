"""Fingerprint: one number for a set of records, whatever the file's name, format and order of rows.

Knows no task. A fingerprint is a fact about private data: it stays at the site unless the site decides otherwise.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedtune.data.table import Table

_DOMAIN = b"fedtune records v1\n"


def fingerprint(table: Table, columns: Sequence[str]) -> str:
    """Return SHA-256, in hex, over the sorted SHA-256 digests of the rows' named columns.

    A row is the canonical JSON of its values: `{"column": value, …}`, keys sorted, no spaces, UTF-8. Sorting makes the
    rows a multiset: their order does not matter and their number does. A value that JSON has no form for counts as
    its text. Equal fingerprints mean equal records, short of a collision of SHA-256.
    """
    named = {name: table.column(name) for name in sorted(set(columns))}
    rows = sorted(_digest({name: values[row] for name, values in named.items()}) for row in range(table.rows))
    return hashlib.sha256(_DOMAIN + b"".join(rows)).hexdigest()


def _digest(row: dict[str, object]) -> bytes:
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
