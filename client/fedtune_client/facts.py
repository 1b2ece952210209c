"""`site.yaml`: facts of this machine: the site's name, where its data sets and base models are, how its client runs.

A plan names a data set, and a base model by its hash; only this file turns either into a path, so nothing that arrives
can choose one. Looking facts up opens no data file and no model. Knows no policy, no consent and no task.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fedtune.config.overrides import Assignment, Text
from fedtune.config.sources import read_file
from fedtune.data.formats import read_table
from fedtune.data.table import Table
from fedtune.errors import ConfigError, ConsentError, DataError

FILE_NAME = "site.yaml"
FORMATS = ("auto", "csv", "tsv", "json", "jsonl", "parquet", "arrow")  # no hub: a site's data are on its machine
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DATA_KEY = re.compile(rf"data\.(?P<name>{_NAME.pattern})\.(?P<key>path|format)")
_MODEL_KEY = re.compile(rf"models\.(?P<name>{_NAME.pattern})")
_PACKAGE = re.compile(r"package:[A-Za-z_][A-Za-z0-9_]*")
_SHAPE = "write name: SITE, data: {NAME: {path: FILE, format: auto}}, and models: {NAME: FOLDER}"


@dataclass(frozen=True, slots=True)
class DataFile:
    """Where a data set is, and in which format (`auto`: as its name shows)."""

    path: Path
    format: str = "auto"


class FileStamp(NamedTuple):
    """What the file system says of a file; it differs once the file is replaced or written to."""

    name: str
    size: int
    modified: int
    changed: int
    inode: int
    device: int


Stamp = tuple[FileStamp, ...]  # one file, or each of a saved folder


@dataclass(frozen=True, slots=True)
class OpenTable:
    """A whole data set as it was when its file had this stamp."""

    table: Table
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Service:
    """How a site's client runs; a port is on loopback, and 0 takes a free one.

    `threads` is None for as many as the machine has cores. `poll` is the seconds between two questions for work.
    """

    device: str = "auto"
    threads: int | None = None
    runtime_port: int = 0
    health_port: int = 0
    log_format: str = "text"
    poll: float = 1.0


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """A site's name, its data sets and its base models by name; `folder` is where `site.yaml` is.

    A base model is an absolute path, or `package:NAME` for one that an installed package brings along.
    """

    folder: Path
    name: str
    data: Mapping[str, DataFile]
    models: Mapping[str, str] = field(default_factory=dict)
    service: Service = Service()

    def find(self, name: str) -> DataFile:
        """Return where a data set is; `consent.unknown-data` for a name that the site does not have."""
        if name not in self.data:
            near = get_close_matches(name, self.data, n=1)
            meant = f"the nearest name is {near[0]}; " if near else ""
            raise ConsentError(
                "unknown-data",
                f"the site has no data set of the name that was asked for; it has {', '.join(self.data) or 'none'}",
                hint=f"{meant}data sets are named in {self.folder / FILE_NAME}",
            )
        return self.data[name]


def read_facts(folder: Path) -> SiteFacts:
    """Read `site.yaml` of a site's folder; relative paths in it start at the folder.

    Raises ConfigError: `file-missing`, `file-unreadable`, `bad-yaml`, `unknown-key` with the nearest one,
    `missing-value`, `bad-value`.
    """
    file = folder / FILE_NAME
    try:
        assignments = read_file(file)
    except ConfigError as error:
        hint = "make a site's folder with: fedtune client init" if error.code == "config.file-missing" else _SHAPE
        raise ConfigError(error.code.removeprefix("config."), error.message, hint=hint) from None
    name, files, models, service = "", dict[str, dict[str, str]](), dict[str, str](), dict[str, Any]()
    for entry in assignments:
        if entry.key == "name":
            name = _checked("name", entry)
        elif found := _DATA_KEY.fullmatch(entry.key):
            files.setdefault(found["name"], {})[found["key"]] = _checked(found["key"], entry)
        elif found := _MODEL_KEY.fullmatch(entry.key):
            models[found["name"]] = _model(folder, entry)
        elif entry.key in _SERVICE:
            service[entry.key] = _value(entry)
        elif entry.key not in {"data", "models"} or entry.value != Text(""):  # alone, it says that there is none yet
            raise _unknown(entry)
    if not name:
        raise _missing(file, "name", "what the site is called")
    data = {at: _data_file(folder, at, keys) for at, keys in files.items()}
    return SiteFacts(folder, name, MappingProxyType(data), MappingProxyType(models), Service(**service))


def open_table(facts: SiteFacts, name: str) -> OpenTable:
    """Read a whole data set, all its columns.

    Raises `consent.unknown-data`, `data.missing-file`, `data.not-a-file` for a pipe or a device, `data.changed` when
    the file was written to meanwhile, and what `read_table` raises.
    """
    file = facts.find(name)
    before = stamp(facts, name)
    table = read_table(str(file.path), file.format)
    if stamp(facts, name) != before:
        raise DataError("changed", f"{file.path} was written to while it was read", hint="try again when it is at rest")
    return OpenTable(table, before)


def stamp(facts: SiteFacts, name: str) -> Stamp:
    """Return what the file system says of a data set now, without opening it."""
    path = facts.find(name).path
    try:
        return tuple(_stamps(path))
    except OSError as error:
        raise DataError(
            "missing-file",
            f"the data set '{name}' cannot be found at {path} ({error.strerror or error})",
            hint=f"put it there, or correct data.{name}.path in {facts.folder / FILE_NAME}",
        ) from error


def changed_since(facts: SiteFacts, name: str, earlier: Stamp) -> bool:
    """Whether a data set was replaced, written to or taken away since it had an earlier stamp."""
    try:
        return stamp(facts, name) != earlier
    except DataError:
        return True


def _stamps(path: Path) -> Iterable[FileStamp]:
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        for inside in sorted(path.iterdir()):
            yield _stamp(inside.name, inside.stat())
    elif stat.S_ISREG(found.st_mode):
        yield _stamp(path.name, found)
    else:
        raise DataError("not-a-file", f"{path} is neither a file nor a folder", hint="name a file of records")


def _stamp(name: str, found: os.stat_result) -> FileStamp:
    return FileStamp(name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


def _text(entry: Assignment) -> str:
    if isinstance(entry.value, Text) and not entry.value.is_null:
        return entry.value.text
    raise ConfigError("bad-value", f"{entry.key} ({entry.place}) must be one text", hint=_SHAPE)


def _checked(key: str, entry: Assignment) -> str:
    text = _text(entry)
    if key == "format" and text not in FORMATS:
        raise _bad(entry, text, ", ".join(FORMATS))
    if key == "name" and not _NAME.fullmatch(text):
        raise _bad(entry, text, "letters, digits, dots, hyphens and underscores, at most 64")
    return text


def _model(folder: Path, entry: Assignment) -> str:
    """Return a base model as `find_base` takes it; never a name that could be looked for in a hub."""
    text = _text(entry)
    if not text.startswith("package:"):
        return str((folder / Path(text).expanduser()).absolute())
    if not _PACKAGE.fullmatch(text):
        raise _bad(entry, text, "a folder, or package:NAME of an installed package")
    return text


def _value(entry: Assignment) -> Any:
    read, allowed = _SERVICE[entry.key]
    text = _text(entry)
    try:
        return read(text)
    except ValueError:
        raise _bad(entry, text, allowed) from None


def _one_of(words: tuple[str, ...], text: str) -> str:
    if text not in words:
        raise ValueError(text)
    return text


def _between(kind: Callable[[str], float], lowest: float, highest: float, text: str) -> float:
    value = kind(text)
    if not lowest <= value <= highest:
        raise ValueError(text)
    return value


_PORT = partial(_between, int, 0, 2**16 - 1), "a port, 0 to 65535; 0 takes a free one"
_SERVICE: Mapping[str, tuple[Callable[[str], Any], str]] = MappingProxyType(
    {
        "device": (partial(_one_of, ("auto", "cpu", "cuda")), "auto, cpu, cuda"),
        "threads": (partial(_between, int, 1, 1024), "a whole number, 1 to 1024"),
        "runtime_port": _PORT,
        "health_port": _PORT,
        "log_format": (partial(_one_of, ("text", "json")), "text, json"),
        "poll": (partial(_between, float, 0.05, 30), "seconds, 0.05 to 30"),
    }
)


def _data_file(folder: Path, name: str, keys: Mapping[str, str]) -> DataFile:
    if "path" not in keys:
        raise _missing(folder / FILE_NAME, f"data.{name}.path", "the file of its records")
    return DataFile(folder / keys["path"], keys.get("format", "auto"))


def _bad(entry: Assignment, text: str, allowed: str) -> ConfigError:
    return ConfigError("bad-value", f"{entry.key}={text} ({entry.place}): allowed is {allowed}", hint=_SHAPE)


def _missing(file: Path, key: str, allowed: str) -> ConfigError:
    return ConfigError("missing-value", f"{file}: {key} must be given: {allowed}", hint=_SHAPE)


def _unknown(entry: Assignment) -> ConfigError:
    words = entry.key.split(".")
    here = ".".join(words[:2])
    inside = words[0] == "data" and len(words) > 1
    known = ["name", f"{here}.path", f"{here}.format"] if inside else ["name", "data", "models", *_SERVICE]
    near = get_close_matches(entry.key, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else _SHAPE
    return ConfigError("unknown-key", f"{entry.key} ({entry.place}) is not a key", hint=hint)
