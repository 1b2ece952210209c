"""CSV and TSV with exact line numbers. Knows no task."""

from __future__ import annotations

import contextlib
import csv
import threading
from itertools import islice
from typing import TYPE_CHECKING

from fedtune.data.table import Table, require_columns
from fedtune.data.textfile import numbered_lines
from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_FIELD_LIMIT = 1 << 30  # the csv module stops at 128 KiB, which one clinical note can exceed
_field_limit_lock = threading.Lock()
_Row = tuple[int, list[str]]


def read_delimited(path: Path, delimiter: str, columns: Sequence[str] | None, limit: int | None) -> Table:
    """Read a delimited file with a header line; fields are quoted with `"` and may span lines.

    Every row must have as many fields as the header. Blank lines are skipped.
    Raises `data.blank-header`, `data.duplicate-header`, `data.missing-column`, `data.broken-row`.
    """
    with _long_fields():
        rows = _rows(path, delimiter)
        _, header = next(rows, (1, []))
        _check_header(header, path)
        names = header if columns is None else columns
        require_columns(names, header, str(path))
        body = list(islice(_even_rows(rows, header, path), limit))
    places = {name: header.index(name) for name in names}
    return Table(
        {name: tuple(fields[at] for _, fields in body) for name, at in places.items()},
        rows=len(body),
        source=str(path),
        format="tsv" if delimiter == "\t" else "csv",
        lines=tuple(line for line, _ in body),
    )


def _rows(path: Path, delimiter: str) -> Iterator[_Row]:
    """Yield (line on which the row starts, fields), without blank lines."""
    reader = csv.reader((line for _, line in numbered_lines(path)), delimiter=delimiter, strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            "broken-row",
            f"{path}: the row that starts on line {start} cannot be read: {error}",
            hint="look for a quote that is never closed, or write the quotes inside a field twice",
        ) from error


def _even_rows(rows: Iterator[_Row], header: list[str], path: Path) -> Iterator[_Row]:
    """Pass on the rows that are as long as the header; stop with an error at the first that is not."""
    for line, fields in rows:
        if len(fields) != len(header):
            raise DataError(
                "broken-row",
                f"{path}, line {line}: {len(fields)} fields, the header has {len(header)}",
                hint="put a field that holds the separator in double quotes, or set data.format to the right separator",
            )
        yield line, fields


def _check_header(header: list[str], path: Path) -> None:
    """Refuse a header in which a column cannot be named."""
    for at, name in enumerate(header, start=1):
        if not name.strip():
            raise DataError(
                "blank-header", f"{path}: column {at} of the header has no name", hint="name it in the first line"
            )
        if name in header[: at - 1]:
            raise DataError(
                "duplicate-header", f"{path}: two columns are named '{name}'", hint="rename one in the first line"
            )


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Raise the csv module's process-wide field limit while reading, one reader at a time."""
    with _field_limit_lock:
        before = csv.field_size_limit(_FIELD_LIMIT)
        try:
            yield
        finally:
            csv.field_size_limit(before)
