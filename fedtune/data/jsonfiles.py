"""JSON and JSON Lines with exact line numbers. Knows no task."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import TYPE_CHECKING

from fedtune.data.table import Table, require_columns
from fedtune.data.textfile import numbered_lines, whole_text
from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_Row = tuple[int, dict[str, object]]
_BETWEEN_OBJECTS = re.compile(r"[\s\[,]*")


def read_json_lines(path: Path, columns: Sequence[str] | None, limit: int | None) -> Table:
    """Read one JSON object a line; blank lines are skipped, a key that a row lacks is None in it.

    Raises `data.broken-json` with the line, `data.missing-column`.
    """
    rows = (
        (line, _object(_parse(text.rstrip(), path, line), path, line))
        for line, text in numbered_lines(path)
        if text.strip()
    )
    return _table_of_rows(list(islice(rows, limit)), path, "jsonl", columns)


def read_json(path: Path, columns: Sequence[str] | None, limit: int | None) -> Table:
    """Read an array of objects (one a row) or an object of arrays (one a column).

    Raises `data.broken-json` with the line, `data.json-shape`, `data.missing-column`.
    """
    text = whole_text(path)
    value = _parse(text, path, first_line=1) if text.strip() else []
    if not isinstance(value, list):
        return _table_of_arrays(value, path, columns, limit)
    lines = _object_lines(text) if all(isinstance(row, dict) for row in value) else [1] * len(value)
    rows = ((line, _object(row, path, line)) for line, row in zip(lines, value, strict=False))
    return _table_of_rows(list(islice(rows, limit)), path, "json", columns)


def _object_lines(text: str) -> Iterator[int]:
    """Yield the line on which each object of a valid array of objects starts."""
    decoder = json.JSONDecoder()
    line, at = 1, 0
    while (start := _next_object(text, at)) < len(text) and text[start] != "]":
        line += text.count("\n", at, start)
        yield line
        _, at = decoder.raw_decode(text, start)
        line += text.count("\n", start, at)


def _next_object(text: str, at: int) -> int:
    skipped = _BETWEEN_OBJECTS.match(text, at)
    return skipped.end() if skipped else at


def _parse(text: str, path: Path, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _broken(path, first_line + error.lineno - 1, error.msg) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting without end
        raise _broken(path, first_line, str(error)) from error


def _object(value: object, path: Path, line: int) -> dict[str, object]:
    if isinstance(value, dict):
        return value
    raise _broken(path, line, f'expected an object such as {{"text": …}}, found {type(value).__name__}')


def _broken(path: Path, line: int, problem: str) -> DataError:
    return DataError(
        "broken-json", f"{path}, line {line}: {problem}", hint="mend or remove that line, then run: fedtune data check"
    )


def _table_of_rows(rows: list[_Row], path: Path, fmt: str, columns: Sequence[str] | None) -> Table:
    found = tuple(dict.fromkeys(key for _, row in rows for key in row))
    names = found if columns is None else columns
    if rows:
        require_columns(names, found, str(path))
    return Table(
        {name: tuple(row.get(name) for _, row in rows) for name in names},
        rows=len(rows),
        source=str(path),
        format=fmt,
        lines=tuple(line for line, _ in rows),
    )


def _table_of_arrays(value: object, path: Path, columns: Sequence[str] | None, limit: int | None) -> Table:
    arrays = value if isinstance(value, dict) else {}
    lengths = {len(array) if isinstance(array, list) else -1 for array in arrays.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise DataError(
            "json-shape",
            f"{path} is neither an array of objects nor an object of arrays of one length",
            hint="write [{…}, {…}], or one object a line with data.format=jsonl",
        )
    names = tuple(arrays) if columns is None else columns
    require_columns(names, tuple(arrays), str(path))
    kept = {name: tuple(arrays[name][:limit]) for name in names}
    return Table(kept, rows=len(next(iter(arrays.values()))[:limit]), source=str(path), format="json")
