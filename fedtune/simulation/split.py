"""The records of each site of a simulation as a file of its own, and the study for sites that have these files.

For a federation of real sites on one machine: a walk-through, a test. Knows no model and no process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.config.schema import DataSettings, ModelSettings, Settings
from fedtune.config.written import study_text
from fedtune.data.formats import read_table
from fedtune.data.loading import labelled
from fedtune.data.table import Table
from fedtune.data.tasks import ROLES, Task, find_task
from fedtune.data.writing import WrittenFormat, encode_table, written_format
from fedtune.errors import DataError, RunError
from fedtune.run.files import disk_errors, write_whole
from fedtune.simulation.dealing import Dealing
from fedtune.simulation.planning import absolute, data_name, delta_of
from fedtune.simulation.refusals import refuse_told_unit
from fedtune.simulation.resolve import check_records, read_records, sizes

STUDY_FILE = "study.yaml"


@dataclass(frozen=True, slots=True)
class SitePart:
    """One site's records with all their columns, in the order of the source, and how many of them it holds out."""

    name: str
    table: Table
    held_out: int


@dataclass(frozen=True, slots=True)
class Split:
    """What each simulated site has, and the settings of the same study for real sites that have it in files."""

    parts: tuple[SitePart, ...]
    study: Settings


def split(settings: Settings) -> Split:
    """Return each site's records, exactly those that `simulate` deals to it with these settings.

    A site of the same name that uses its whole file (no rule of consent leaves a record out) trains on and holds out
    the very same records as the simulated one: the draw depends on the seed, the name and the number of units alone,
    and a unit's place among a site's units is the same in the part as in the whole. The plan of the study is the
    simulation's, to the hash, if records come from a file; made-up ones become a data set of that name.
    Raises what `resolve` raises about the records.
    """
    table, task = _read(settings)
    check_records(settings, table, task)
    refuse_told_unit(settings, task)
    deal = Dealing.of_settings(settings).deal(table, task)
    rows = [np.sort(np.concatenate([site.train, site.held_out])) for site in deal.sites]
    taken = [table.take([int(row) for row in of_site]) for of_site in rows]
    parts = [SitePart(site.name, part, len(site.held_out)) for site, part in zip(deal.sites, taken, strict=True)]
    delta = delta_of(settings.privacy, sizes(deal)) if settings.privacy.mode == "dp" else settings.privacy.delta
    return Split(tuple(parts), _study(settings, task, delta))


def write_split(found: Split, folder: Path, fmt: WrittenFormat | None = None) -> dict[str, Path]:
    """Write SITE.csv or SITE.jsonl for each site and `study.yaml`, all or none; return each site's file.

    A folder that is made here is its owner's alone, as the records may be private. Errors: `data.exists` for a file
    that is there, which is never replaced; `data.disk-full`, `data.unwritable`.
    """
    chosen = fmt or written_format(found.parts[0].table)
    files = {part.name: folder / f"{part.name}.{chosen}" for part in found.parts}
    contents = {files[part.name]: encode_table(part.table, chosen) for part in found.parts}
    about = f"The study of the records beside it: fedtune server submit --config {STUDY_FILE}"
    contents[folder / STUDY_FILE] = study_text(found.study, about).encode()
    _refuse_existing(contents)
    with _all_or_none(contents):
        with disk_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, data in contents.items():
            write_whole(path, data)
    return files


def _read(settings: Settings) -> tuple[Table, Task]:
    """Return all columns of the records that a study reads the used ones of."""
    data = settings.data
    if data.source != "file" or data.path is None:
        return read_records(settings)
    table = read_table(data.path, data.format, limit=data.limit, allow_download=settings.model.allow_download)
    return table, labelled(table, find_task(data, table.names), data)


def _study(settings: Settings, task: Task, delta: float | None) -> Settings:
    """Return the settings that say by themselves what was found in the records, for `resolve_apart`."""
    changes = {
        "data": settings.data.model_copy(update=_told_data(settings.data, task)),
        "model": settings.model.model_copy(update={"base": _base(settings.model)}),
        "privacy": settings.privacy.model_copy(update={"delta": delta}),
    }
    return settings.model_copy(update=changes)


def _told_data(data: DataSettings, task: Task) -> dict[str, object]:
    roles = {role: task.columns.get(role) for style in ROLES.values() for role in style}
    told = {"name": data_name(data), "source": "file", "path": None, "format": "auto", "test": absolute(data.test)}
    # Of a file the limit holds for the whole, so no part has more; of made-up messages it has been kept already.
    return {**roles, **told, "labels": task.labels or None, "limit": data.limit if data.source == "file" else None}


def _base(model: ModelSettings) -> str:
    folder = Path(model.base).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model.base


def _refuse_existing(contents: dict[Path, bytes]) -> None:
    there = [str(path) for path in contents if os.path.lexists(path)]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise DataError("exists", f"{there[0]}{more} would be replaced", hint="name another folder with --out")


@contextmanager
def _all_or_none(contents: dict[Path, bytes]) -> Iterator[None]:
    """Take back what was written when the rest cannot be, and say so without advice about runs."""
    try:
        yield
    except BaseException as error:
        for path in contents:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
        if not isinstance(error, RunError):
            raise
        slug = error.code.removeprefix(f"{error.area}.")
        raise DataError(slug, error.message, hint="mend that, or name another folder with --out") from error
