"""A table as the bytes of a CSV or JSON Lines file that `fedtune.data.formats` reads back. Knows no task, no path."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Literal

from fedtune.data.cells import mixed
from fedtune.data.plain import plain_text
from fedtune.data.table import Table
from fedtune.errors import DataError

WrittenFormat = Literal["csv", "jsonl"]


def written_format(table: Table) -> WrittenFormat:
    """Return the format that changes no cell: CSV of a table that was text, JSON Lines of one that had types."""
    return "csv" if table.format in {"csv", "tsv", "synthetic"} else "jsonl"


def encode_table(table: Table, fmt: WrittenFormat) -> bytes:
    """Return the file of a table, its columns in order, in UTF-8.

    Text is written as it is. CSV has no other types: there numbers and truth values become text as JSON writes them,
    and nothing becomes the empty field. JSON keeps them; what it has no form for (dates, decimals) becomes text.
    Raises `data.mixed-types` for bytes, and in CSV for lists and objects; `data.not-unicode` for half a character.
    """
    text = _FORMATS[fmt](table)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            "not-unicode",
            f"{table.source} holds half of a character (U+{ord(text[error.start]):04X}), which no file can hold",
            hint="correct that record; it was written as \\ud… in JSON",
        ) from error


def _csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file)  # RFC 4180, which also quotes a lone carriage return in every supported Python
    writer.writerow(table.names)
    for row in range(table.rows):
        writer.writerow([_field(table, name, row) for name in table.names])
    return file.getvalue()


def _field(table: Table, name: str, row: int) -> str:
    value = table.columns[name][row]
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | list | tuple | dict):
        raise mixed(table, name, row, "text or a number")
    return plain_text(value)


def _json_lines(table: Table) -> str:
    return "".join(f"{_object(table, row)}\n" for row in range(table.rows))


def _object(table: Table, row: int) -> str:
    members = (f"{json.dumps(name, ensure_ascii=False)}: {_value(table, name, row)}" for name in table.names)
    return "{" + ", ".join(members) + "}"


def _value(table: Table, name: str, row: int) -> str:
    def as_text(value: object) -> str:
        if isinstance(value, bytes):
            raise mixed(table, name, row, "text or a number")
        return plain_text(value)

    return json.dumps(table.columns[name][row], ensure_ascii=False, default=as_text)


_FORMATS: dict[WrittenFormat, Callable[[Table], str]] = {"csv": _csv, "jsonl": _json_lines}
