"""A table of records as it was read: columns, and where each row stands in its file. Knows no format and no task."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns of equal length.

    `source` names the file for messages. `lines[i]` is the line of the file on which row i starts, counted from 1;
    `None` where the format has no lines (Parquet, Arrow, Hub).
    """

    columns: dict[str, tuple[object, ...]]
    rows: int
    source: str
    format: str
    lines: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        lengths = {len(values) for values in self.columns.values()} | ({len(self.lines)} if self.lines else set())
        if lengths - {self.rows}:
            raise ValueError(f"columns and line numbers must have {self.rows} entries each")

    @property
    def names(self) -> tuple[str, ...]:
        """The columns' names, in the order of the file."""
        return tuple(self.columns)

    def column(self, name: str) -> tuple[object, ...]:
        """Return one column; an unknown name is `data.missing-column` with the nearest name."""
        require_columns([name], self.names, self.source)
        return self.columns[name]

    def place(self, row: int) -> str:
        """Say where row `row` (counted from 0) stands, for a message: `bank.csv, line 12`."""
        where = f"line {self.lines[row]}" if self.lines else f"row {row + 1}"
        return f"{self.source}, {where}"

    def select(self, names: Iterable[str]) -> Table:
        """Return the table with these columns only, in this order."""
        return replace(self, columns={name: self.column(name) for name in names})

    def take(self, rows: Sequence[int]) -> Table:
        """Return the table of these rows, in this order; line numbers stay those of the file."""
        columns = {name: tuple(values[row] for row in rows) for name, values in self.columns.items()}
        lines = tuple(self.lines[row] for row in rows) if self.lines else None
        return replace(self, columns=columns, rows=len(rows), lines=lines)


def require_columns(needed: Iterable[str], found: Sequence[str], source: str) -> None:
    """Raise `data.missing-column` for the first needed column that is not among those found."""
    for name in needed:
        if name not in found:
            near = difflib.get_close_matches(name.lower(), [other.lower() for other in found], n=1)
            meant = next((other for other in found if near and other.lower() == near[0]), None)
            listed = ", ".join(found) or "none"
            raise DataError(
                "missing-column",
                f"{source} has no column '{name}'; its columns: {listed}",
                hint=f"did you mean '{meant}'?"
                if meant
                else "name the columns with data.text=…, data.label=…, privacy.unit=… and so on",
            )
