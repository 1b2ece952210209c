"""Parquet, Arrow files, saved `datasets` folders and the Hub. Knows no task.

pyarrow and datasets are imported where they are used: neither is needed for a text file.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from fedtune.data.table import Table, require_columns
from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+))?", re.ASCII)


def read_parquet(path: Path, columns: Sequence[str] | None, limit: int | None) -> Table:
    """Read a Parquet file, only the columns asked for; raises `data.not-parquet`, `data.missing-column`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = _chosen(columns, file.schema_arrow.names, path)
            batches = () if limit == 0 else file.iter_batches(columns=list(names))
            return _table_of_batches(batches, names, file.schema_arrow, limit, source=str(path), fmt="parquet")
    except (pa.ArrowException, OSError) as error:
        raise _not_a("parquet", path, error) from error


def read_arrow(path: Path, columns: Sequence[str] | None, limit: int | None) -> Table:
    """Read an Arrow IPC file (random access or stream) or a folder that `Dataset.save_to_disk` wrote.

    Raises `data.not-arrow`, `data.several-splits` for a folder of splits, `data.missing-column`.
    """
    if path.is_dir():
        return _read_saved_folder(path, columns, limit)
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            reader = _ipc_reader(source)
            names = _chosen(columns, reader.schema.names, path)
            batches = (batch.select(list(names)) for batch in _ipc_batches(reader))
            return _table_of_batches(batches, names, reader.schema, limit, source=str(path), fmt="arrow")
    except (pa.ArrowException, OSError) as error:
        raise _not_a("arrow", path, error) from error


def read_hub(name: str, columns: Sequence[str] | None, limit: int | None) -> Table:
    """Read `OWNER/NAME[@REVISION][:SPLIT]` from the Hub or its cache; the split is `train` unless said.

    The caller has checked that downloading is allowed. Raises `data.bad-hub-id`, `data.hub`.
    """
    import datasets

    parts = _HUB_ID.fullmatch(name)
    if not parts:
        raise DataError("bad-hub-id", f"'{name}' is no Hub id", hint="write OWNER/NAME, OWNER/NAME@REVISION or …:SPLIT")
    try:
        loaded = datasets.load_dataset(parts["id"], split=parts["split"] or "train", revision=parts["revision"])
    except Exception as error:  # datasets raises a dozen unrelated types for network, name, split and format
        raise DataError(
            "hub",
            f"{name} cannot be loaded from the Hub: {error}",
            hint="check the name and the network, or download the file and set data.path to it",
        ) from error
    return _table_of_dataset(loaded, columns, limit, source=name, fmt="hub")


def _read_saved_folder(path: Path, columns: Sequence[str] | None, limit: int | None) -> Table:
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text("utf-8")).get("splits", [])
        raise DataError(
            "several-splits",
            f"{path} holds several splits: {', '.join(splits)}",
            hint=f"name one of them: data.path={path / (splits[0] if splits else 'train')}",
        )
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises what its parts raise: OSError, ValueError, ArrowInvalid, KeyError
        raise _not_a("arrow", path, error) from error
    return _table_of_dataset(loaded, columns, limit, source=str(path), fmt="arrow")


def _table_of_dataset(
    dataset: Any, columns: Sequence[str] | None, limit: int | None, *, source: str, fmt: str
) -> Table:
    names = _chosen(columns, dataset.column_names, source)
    kept = dataset.with_format("arrow").select_columns(list(names))
    return _table_of_batches(kept.iter(1000), names, dataset.features.arrow_schema, limit, source=source, fmt=fmt)


def _table_of_batches(
    batches: Iterable[Any], names: Sequence[str], schema: Any, limit: int | None, *, source: str, fmt: str
) -> Table:
    """Gather Arrow batches into Python values, at most `limit` rows, with class numbers turned into class names."""
    values: dict[str, list[object]] = {name: [] for name in names}
    rows = 0
    for batch in batches:
        part = batch if limit is None else batch.slice(0, limit - rows)
        for name in names:
            values[name].extend(part.column(name).to_pylist())
        rows += part.num_rows
        if rows == limit:
            break
    for name, classes in _class_names(schema).items():
        if name in values:
            values[name] = [_class_name(value, classes) for value in values[name]]
    return Table({name: tuple(held) for name, held in values.items()}, rows=rows, source=source, format=fmt)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the names behind each `ClassLabel` column, which `datasets` keeps in the schema's metadata as JSON."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    return {name: kind["names"] for name, kind in features.items() if _is_class_label(kind)}


def _is_class_label(kind: object) -> bool:
    return isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and isinstance(kind.get("names"), list)


def _class_name(value: object, classes: list[str]) -> object:
    """Name a class; the library's -1 for an unlabelled row becomes None."""
    if isinstance(value, int):
        return classes[value] if 0 <= value < len(classes) else None
    return value


def _chosen(columns: Sequence[str] | None, found: Sequence[str], source: object) -> tuple[str, ...]:
    require_columns(columns or (), found, str(source))
    return tuple(found if columns is None else columns)


def _ipc_reader(source: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _ipc_batches(reader: Any) -> Iterable[Any]:
    count = getattr(reader, "num_record_batches", None)
    return reader if count is None else (reader.get_batch(at) for at in range(count))


def _not_a(fmt: str, path: Path, error: Exception) -> DataError:
    return DataError(
        f"not-{fmt}",
        f"{path} cannot be read as {fmt}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        hint="check that the copy is complete, or say what it is with data.format=csv, jsonl, parquet, …",
    )
