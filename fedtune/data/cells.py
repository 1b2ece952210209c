"""Cells of a table as text, and the errors about one cell, each with its place. Knows no task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.errors import DataError

if TYPE_CHECKING:
    from fedtune.data.table import Table


def texts(table: Table, column: str, *, optional: bool = False) -> tuple[str, ...]:
    """Return a column of text; where `optional`, a missing or blank cell is the empty string.

    Raises `data.blank-value` for a missing, empty or white-space cell and `data.mixed-types` for one that is not text.
    """
    return tuple(_text(table, column, row, value, optional) for row, value in enumerate(table.column(column)))


def blank(table: Table, column: str, row: int) -> DataError:
    """Say that a needed cell is empty."""
    return DataError(
        "blank-value",
        f"{table.place(row)}: column '{column}' is empty",
        hint="fill the cell or remove the record",
    )


def mixed(table: Table, column: str, row: int, wanted: str) -> DataError:
    """Say that a cell has another type than the one that is named, and not what it holds."""
    found = type(table.columns[column][row]).__name__
    return DataError(
        "mixed-types",
        f"{table.place(row)}: column '{column}' holds {found} where {wanted} is expected",
        hint="make the column one type throughout, or name another column",
    )


def _text(table: Table, column: str, row: int, value: object, optional: bool) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if value is None or isinstance(value, str):
        if optional:
            return ""
        raise blank(table, column, row)
    raise mixed(table, column, row, "text")
