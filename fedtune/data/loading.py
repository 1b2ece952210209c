"""From a path and the settings to a table and its task: the order in which the other modules are used.

Knows no tokenizer and no site.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.data.formats import column_names, read_table
from fedtune.data.labels import find_labels
from fedtune.data.tasks import find_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedtune.config.schema import DataSettings
    from fedtune.data.table import Table
    from fedtune.data.tasks import Task


def load(
    path: str, settings: DataSettings, *, also: Sequence[str] = (), allow_download: bool = False
) -> tuple[Table, Task]:
    """Read the records of a new study: find the task, read the columns it uses and those in `also`, find the labels.

    `data.labels` replaces the labels found. Raises what `column_names`, `find_task`, `read_table` and `find_labels` do.
    """
    names = column_names(path, settings.format, limit=settings.limit, allow_download=allow_download)
    task = find_task(settings, names)
    table = load_for(path, settings, task, also=also, allow_download=allow_download)
    return table, labelled(table, task, settings)


def load_for(
    path: str, settings: DataSettings, task: Task, *, also: Sequence[str] = (), allow_download: bool = False
) -> Table:
    """Read the records for a task that is known: a test file, or a site's own file under a plan."""
    columns = tuple(dict.fromkeys((*task.used, *also)))
    return read_table(path, settings.format, columns=columns, limit=settings.limit, allow_download=allow_download)


def labelled(table: Table, task: Task, settings: DataSettings) -> Task:
    """Return a classification task with its labels: those of the settings, or those of the table."""
    if task.kind != "classification":
        return task
    return task.with_labels(settings.labels or find_labels(table, task))
