"""A study plan made apart from the records: they are at the sites, and the coordinator has only what the study says.

Knows no record of a site; reads the coordinator's own test file, which is public, where `data.test` names one.
"""

from __future__ import annotations

from fedtune.aggregation.weights import site_weights
from fedtune.config.schema import Settings
from fedtune.data.loading import labelled
from fedtune.data.records import to_records
from fedtune.data.tasks import Task, find_task
from fedtune.errors import ConfigError, DataError
from fedtune.model.base import find_base
from fedtune.model.build import check_length
from fedtune.simulation.planning import Resolved, complete
from fedtune.simulation.refusals import refuse_early, refuse_told_unit
from fedtune.simulation.resolve import read_test

_UNTOLD = {"data.no-task", "data.missing-column"}  # what finding a task says when a column is not named


def resolve_apart(settings: Settings) -> Resolved:
    """Return the study that settings describe, for sites whose records nobody here can see.

    What `resolve` finds in the records, the settings must say: `data.name`; the task's columns, none of which is
    guessed; `data.labels` of a classification, or else they are those of `data.test`; and with privacy
    `privacy.delta`, whose default follows from the sites' sizes. Told the same, both make the same plan, to the hash.
    `data.path` is not read, and `Resolved.sites` is empty. `data.limit` holds for each site's file, and
    `data.partition` means nothing there.

    Errors: `config.made-up-records` for another source than files, `config.missing-value` with everything that the
    settings leave open, `data.conflicting-columns`, and what `resolve` raises about anything but the records.
    """
    refuse_early(settings)
    task = _told_task(settings)
    base = find_base(settings.model)
    check_length(base, settings.data.max_tokens)
    refuse_told_unit(settings, task)
    site_weights(settings.aggregation, [str(at) for at in range(settings.federation.sites)])
    elsewhere = settings.data.model_copy(update={"path": None})
    return complete(settings.model_copy(update={"data": elsewhere}), task, base)


def _told_task(settings: Settings) -> Task:
    """Return the task that the settings tell, or refuse them with all that they leave open."""
    if settings.data.source != "file":
        raise ConfigError(
            "made-up-records",
            f"data.source={settings.data.source} makes records up, and a federation has those of its sites",
            hint="data.source=file; fedtune data split --out FOLDER writes such records to files, and a study for them",
        )
    task, columns = _named_columns(settings)
    untold = [*_untold(settings, task), *columns]
    if task is None or untold:
        lines = "\n  ".join(["the records are at the sites, so the study itself must say", *untold])
        raise ConfigError("missing-value", lines, hint="give them in the study's file, or as KEY=VALUE")
    return _with_labels(settings, task)


def _named_columns(settings: Settings) -> tuple[Task | None, list[str]]:
    """Return the task of the columns that are named, or what is missing of them."""
    try:
        return find_task(settings.data, ()), []
    except DataError as error:
        if error.code not in _UNTOLD:
            raise
        return None, [f"its columns: {error.hint}"]


def _untold(settings: Settings, task: Task | None) -> list[str]:
    data, privacy = settings.data, settings.privacy
    found = []
    if data.name is None:
        found.append("data.name=NAME: what the sites call the data set")
    if privacy.mode == "dp" and privacy.delta is None:
        found.append("privacy.delta: below 1/N for the N privacy units of each site, for example 1e-5")
    if task is not None and task.kind == "classification" and data.labels is None and data.test is None:
        found.append("data.labels=[A,B,...], or data.test=FILE: a public file in which every label occurs")
    return found


def _with_labels(settings: Settings, task: Task) -> Task:
    """Return the task with the labels of the settings, or else of the test file, whose records must all be of it."""
    test = read_test(settings, task)
    if test is not None:
        task = labelled(test, task, settings.data)
        to_records(test, task)
    elif task.kind == "classification":
        task = task.with_labels(settings.data.labels or ())
    return task
