"""`coordinator.yaml`: facts of the coordinator's machine, which no plan and no message can choose.

A plan names a base model and a data set; only this file turns the names into places. Reading it opens no other file.
Knows no study and no process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fedtune.config.overrides import Assignment, Text
from fedtune.config.schema import Section
from fedtune.config.sources import read_file
from fedtune.errors import ConfigError, EnrolmentError, ModelError
from fedtune.pki.names import Address, Federation, host, split_address

PACKAGE = "package:"
_BODY = 8 * 2**20
_LEAST_BODY = 6 * 2**20  # Flower sends arrays in pieces of 5 MiB, and a piece is one request
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")  # a Hub id has a slash in it
_SHOWN = 80
Model = Annotated[str, Field(pattern=rf"^(?:/|{PACKAGE}[A-Za-z_][A-Za-z0-9_]*$)")]
Port = Annotated[int, Field(ge=0, lt=2**16, description="a port, 0 to 65535; 0 takes a free one")]


def _checked_host(text: str) -> str:
    try:
        host(text)
    except EnrolmentError as error:
        raise ValueError(error.message) from error
    return text


class Listen(Section):
    """Where this machine listens for sites, which may be another place than where they reach it (`address`)."""

    host: Annotated[str, AfterValidator(_checked_host)] = Field(
        "0.0.0.0",  # noqa: S104 - sites are on other machines
        description="an IP address or a host name of this machine",
    )
    port: Port


class Limits(Section):
    """What requests may cost, in bytes and connections: `max_body` one request, `max_held` all of them together."""

    max_body: int = Field(_BODY, ge=_LEAST_BODY, description=f"bytes, {_LEAST_BODY} or more")
    max_held: int = Field(32 * _BODY, ge=_LEAST_BODY, description="bytes, max_body or more")
    max_connections: int = Field(256, ge=1, description="a whole number, 1 or more")

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_held < self.max_body:
            raise ValueError("limits.max_held is less than limits.max_body: no request would fit")
        return self


class CoordinatorSettings(Section):
    """The whole file; places are absolute, except that a model may be `package:NAME`."""

    federation: Federation = Field(description="the name that `fedtune server init` has made")
    address: Address = Field(description="HOST:PORT where sites reach this coordinator")
    listen: Listen
    private_port: Port = 9091
    health_port: Port = 9092
    models: Mapping[str, Model] = Field({}, description="a folder, or package:NAME")
    tests: Mapping[str, Path] = Field({}, description="a file of records")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto, cpu or cuda")
    threads: int | None = Field(None, ge=1, description="a whole number, 1 or more, or null")
    log_format: Literal["text", "json"] = Field("text", description="text or json")
    limits: Limits = Limits()

    @property
    def host(self) -> str:
        """The host in `address`."""
        return split_address(self.address)[0]

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = [port for port in (self.listen.port, self.private_port, self.health_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError("listen.port, private_port and health_port must be three ports")
        return self

    def model(self, name: str) -> str:
        """Return where a base model is: an absolute folder, or `package:NAME`. Error: `model.unknown-base`."""
        if name not in self.models:
            near = get_close_matches(name, self.models, n=1)
            meant = f"the nearest name is {near[0]}; " if near else ""
            message = f"coordinator.yaml has no model {name}; it has {', '.join(self.models) or 'none'}"
            raise ModelError("unknown-base", message, hint=f"{meant}add its folder as models.{name}")
        return self.models[name]


def read_settings(file: Path) -> CoordinatorSettings:
    """Read `coordinator.yaml`; relative places in it start at its folder, `listen.port` is the address's unless given.

    Raises ConfigError: `file-missing`, `file-unreadable`, `bad-yaml`, `unknown-key` with the nearest one,
    `missing-value`, `bad-value`; every key of a kind that is wrong is named at once.
    """
    try:
        given = {entry.key: entry for entry in read_file(file) if not _is_empty_section(entry)}
    except ConfigError as error:
        raise _unreadable(error, file) from None
    if unknown := [_unknown(entry) for entry in given.values() if _path(entry.key) is None]:
        raise _refusal("unknown-key", unknown, file)
    try:
        return CoordinatorSettings.model_validate(_tree(given, file.parent.absolute()))
    except ValidationError as error:
        raise _mistakes(error, given, file) from None


@cache
def known_keys() -> Mapping[str, str]:
    """Every key by its dotted name, and what it allows in words; `NAME` stands for a name that a person gives."""
    schema = CoordinatorSettings.model_json_schema()
    return dict(_leaves(schema, schema["$defs"], ""))


def _leaves(schema: Any, definitions: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, entry in schema["properties"].items():
        section = definitions.get(entry.get("$ref", "").rsplit("/", 1)[-1])
        if section is not None:
            yield from _leaves(section, definitions, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}{'.NAME' if 'additionalProperties' in entry else ''}", entry["description"]


def _path(key: str) -> tuple[str, ...] | None:
    """Return where a key stands in the tree, None for one that is not known."""
    first, dot, name = key.partition(".")
    if dot and f"{first}.NAME" in known_keys():
        return (first, name) if _NAME.fullmatch(name) else None
    return tuple(key.split(".")) if key in known_keys() else None


def _is_empty_section(entry: Assignment) -> bool:
    """Whether it is `models:` alone, with nothing below it but remarks."""
    return entry.value == Text("") and any(key.startswith(f"{entry.key}.") for key in known_keys())


def _tree(given: Mapping[str, Assignment], folder: Path) -> dict[str, Any]:
    address = _text(given.get("address"))
    tree: dict[str, Any] = {"listen": {"port": str(address).rpartition(":")[2]}}
    for key, entry in given.items():
        *parents, last = _path(key) or ()
        here = tree
        for name in parents:
            here = here.setdefault(name, {})
        here[last] = _place(entry, folder) if parents and f"{parents[0]}.NAME" in known_keys() else _text(entry)
    return tree


def _text(entry: Assignment | None) -> Any:
    """Return what stands there as text; a list is nothing that a key takes, and stays one to be refused."""
    value = None if entry is None else entry.value
    return value.text if isinstance(value, Text) and not value.is_null else None if isinstance(value, Text) else value


def _place(entry: Assignment, folder: Path) -> Any:
    text = _text(entry)
    if not isinstance(text, str) or (entry.key.startswith("models.") and text.startswith(PACKAGE)):
        return text
    return str(folder / Path(text).expanduser())


def _mistakes(error: ValidationError, given: Mapping[str, Assignment], file: Path) -> ConfigError:
    """Name each key once; what was not given follows from something that is said anyway, unless it is missing."""
    found = {".".join(map(str, entry["loc"])): entry for entry in error.errors(include_url=False)}
    absent = [key for key, entry in found.items() if entry["type"] == "missing"]
    if absent:
        lines = [f"{file}: {key} must be given: {known_keys()[key]}" for key in absent]
        return _refusal("missing-value", lines, file)
    wrong = [_wrong(given[key]) for key in found if key in given]
    broken = [f"{file}: {entry['msg'].removeprefix('Value error, ')}" for key, entry in found.items()]
    return _refusal("bad-value", wrong or broken, file)


def _wrong(entry: Assignment) -> str:
    shown = _text(entry)
    value = "a list" if isinstance(shown, tuple) else "null" if shown is None else shown[:_SHOWN]
    first = entry.key.partition(".")[0]
    allowed = known_keys().get(entry.key) or known_keys()[f"{first}.NAME"]
    return f"{entry.key}={value} ({entry.place}): allowed is {allowed}"


def _unknown(entry: Assignment) -> str:
    first, _, name = entry.key.partition(".")
    if f"{first}.NAME" in known_keys():
        return f"{entry.key[:_SHOWN]} ({entry.place}): {name[:_SHOWN] or 'nothing'} is no name below {first}"
    last = entry.key.rpartition(".")[2]
    same = [key for key in known_keys() if key.rpartition(".")[2] == last]
    near = same or get_close_matches(entry.key, known_keys(), n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"{entry.key[:_SHOWN]} ({entry.place}) is not a key{meant}"


def _refusal(slug: str, lines: Sequence[str], file: Path) -> ConfigError:
    message = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} mistakes in {file.name}", *lines])
    return ConfigError(
        slug, message, hint=f"mend {file}; what each key means stands in it as `fedtune server init` wrote it"
    )


def _unreadable(error: ConfigError, file: Path) -> ConfigError:
    slug = error.code.removeprefix("config.")
    if slug == "file-missing":
        hint = "make one: fedtune server init NAME --address HOST:PORT; or name its folder with --dir"
        return ConfigError(slug, f"there is no coordinator in {file.parent}: {file.name} is missing", hint=hint)
    return ConfigError(slug, error.message, hint=f"mend {file}, or restore it from a backup")
