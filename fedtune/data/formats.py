"""Record files: find the format of a path and read it into a `Table`. Knows no task, model or site.

| format  | what                                               | rows have lines |
|---------|----------------------------------------------------|-----------------|
| csv tsv | header line, `"` quotes, also .gz                  | yes             |
| jsonl   | one object a line, also .gz (`.ndjson` too)        | yes             |
| json    | array of objects or object of arrays, also .gz     | array: yes      |
| parquet | one file                                           | no              |
| arrow   | IPC file, or folder written by `save_to_disk`      | no              |
| hub     | `OWNER/NAME[@REVISION][:SPLIT]`, only when allowed | no              |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fedtune.data.columnar import read_arrow, read_hub, read_parquet
from fedtune.data.delimited import read_delimited
from fedtune.data.jsonfiles import read_json, read_json_lines
from fedtune.data.table import Table
from fedtune.errors import DataError

Reader = Callable[[Path, Sequence[str] | None, int | None], Table]

_READERS: dict[str, Reader] = {
    "csv": lambda path, columns, limit: read_delimited(path, ",", columns, limit),
    "tsv": lambda path, columns, limit: read_delimited(path, "\t", columns, limit),
    "json": read_json,
    "jsonl": read_json_lines,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_SAVED_FOLDER = ("state.json", "dataset_dict.json")


def read_table(
    path: str,
    fmt: str = "auto",
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = None,
    allow_download: bool = False,
) -> Table:
    """Read a record file: all its columns, or only those named; the first `limit` rows, or all.

    Every value stays as the format gives it; what a task needs is checked by `fedtune.data.records`.
    Raises `data.missing-file`, `data.is-a-folder`, `data.unknown-format`, `data.download-not-allowed`,
    `data.empty-file`, and what the format's reader raises.
    """
    table = _reader(path, fmt, allow_download)(columns, limit)
    if table.rows == 0:
        raise DataError("empty-file", f"{path} holds no record", hint="name a file with a header and records")
    return table


def column_names(
    path: str, fmt: str = "auto", *, limit: int | None = None, allow_download: bool = False
) -> tuple[str, ...]:
    """Return the names of a file's columns, from its header or schema where it has one.

    JSON has neither, so its records are read (the first `limit` of them). Raises what `read_table` raises.
    """
    reader = _reader(path, fmt, allow_download)
    names = reader(None, limit if _format(path, fmt) in {"json", "jsonl"} else 0).names
    if not names:
        raise DataError("empty-file", f"{path} holds no record", hint="name a file with a header and records")
    return names


def _reader(path: str, fmt: str, allow_download: bool) -> Callable[[Sequence[str] | None, int | None], Table]:
    """Find who reads this path, after the checks that every format shares."""
    if fmt == "hub":
        if not allow_download:
            raise DataError(
                "download-not-allowed",
                f"'{path}' is on the Hub, and downloading is off",
                hint="allow it with model.allow_download=true, or name a local file",
            )
        return partial(read_hub, path)
    return partial(_READERS[_format(path, fmt)], Path(path))


def _format(path: str, fmt: str) -> str:
    """Return the format that was said, or the one that the name shows."""
    if fmt == "hub":
        return fmt
    file = Path(path)
    if not file.exists():
        raise DataError(
            "missing-file",
            f"there is no file {path} (looked in {Path.cwd()})",
            hint="check data.path; a data set on the Hub needs data.format=hub",
        )
    if file.is_dir() and not any((file / mark).is_file() for mark in _SAVED_FOLDER):
        raise _plain_folder(file)
    if fmt != "auto":
        return fmt
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    found = "arrow" if file.is_dir() else _SUFFIXES.get(suffix.lower())
    if found is None:
        known = ", ".join(_SUFFIXES)
        raise DataError(
            "unknown-format",
            f"the name {file.name} does not show its format; known endings: {known}",
            hint="say it: data.format=csv, tsv, json, jsonl, parquet or arrow",
        )
    return found


def _plain_folder(folder: Path) -> DataError:
    inside = sorted(
        entry.name for entry in folder.iterdir() if entry.name.removesuffix(".gz").endswith(tuple(_SUFFIXES))
    )
    return DataError(
        "is-a-folder",
        f"{folder} is a folder without a saved data set",
        hint=f"name a file in it: data.path={folder / inside[0]}" if inside else "name a file",
    )
