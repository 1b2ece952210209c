"""A cell as plain text, for comparing cells of different files and formats. Knows no column, no task and no error."""

from __future__ import annotations

import hashlib
import math
import unicodedata


def plain_text(value: object) -> str:
    """Return one cell as text in Unicode's composed form, without spaces around it; blank where it says nothing.

    | cell                        | text                                                            |
    |-----------------------------|-----------------------------------------------------------------|
    | text                        | itself, NFC, stripped                                           |
    | None, NaN                   | blank                                                           |
    | truth value, number         | as JSON writes it; 7.0 is 7, because formats disagree about it  |
    | bytes                       | their SHA-256                                                   |
    | date, decimal, and the like | as Python writes it                                             |
    """
    if isinstance(value, str):
        return value.strip() if value.isascii() else unicodedata.normalize("NFC", value).strip()
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return str(value).strip()


def folded(text: str) -> str:
    """Return text with each run of white space as one space and without difference of case, in composed form."""
    small = " ".join(text.split()).casefold()
    return small if small.isascii() else unicodedata.normalize("NFC", small)


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() else repr(value)
