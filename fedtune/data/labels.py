"""Class names: how a cell becomes one, and which a table holds. Knows no tokenizer and no model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedtune.data.cells import blank, mixed
from fedtune.errors import DataError

if TYPE_CHECKING:
    from fedtune.data.table import Table
    from fedtune.data.tasks import Task

_LONGEST_LABEL = 200  # characters
_FREE_TEXT_FROM = 20  # fewer classes than this are never taken for free text
_FREE_TEXT_SHARE = 0.9  # classes per row from which a label column looks like free text


def label_names(table: Table, column: str) -> tuple[str, ...]:
    """Return each row's class name: text without surrounding spaces; a number or a truth value as JSON writes it.

    An integral float counts as the integer (a missing value elsewhere makes pandas store classes as floats).
    Raises `data.blank-value`, `data.mixed-types`.
    """
    values = table.column(column)
    names = tuple(_label_name(table, column, row, value) for row, value in enumerate(values))
    texts = {isinstance(value, str) for value in values}
    if len(texts) > 1:
        odd = next(row for row, value in enumerate(values) if isinstance(value, str) is not isinstance(values[0], str))
        raise mixed(table, column, odd, type(values[0]).__name__)
    return names


def find_labels(table: Table, task: Task) -> tuple[str, ...]:
    """Return the sorted class names of a classification table.

    Raises `data.one-class`, `data.labels-look-like-text`, and what `label_names` raises.
    """
    column = task.columns["label"]
    names = label_names(table, column)
    labels = tuple(sorted(set(names)))
    if len(labels) == 1:
        raise DataError(
            "one-class",
            f"{table.source}: every record has the label '{labels[0]}' in column '{column}'",
            hint="a classifier needs two classes; check data.label, or data.limit if the file is sorted by label",
        )
    crowded = len(labels) > max(_FREE_TEXT_FROM, _FREE_TEXT_SHARE * table.rows)
    if crowded or max(map(len, labels)) > _LONGEST_LABEL:
        raise DataError(
            "labels-look-like-text",
            f"{table.source}: column '{column}' holds {len(labels)} different labels in {table.rows} records",
            hint="it looks like free text: name the column of the classes with data.label=COLUMN",
        )
    return labels


def _label_name(table: Table, column: str, row: int, value: object) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if value is None or isinstance(value, str | float):
        raise blank(table, column, row)
    raise mixed(table, column, row, "text")
