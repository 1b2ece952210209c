"""The messages of one study, schema 1: what a coordinator asks and what a site answers.

An instruction is `describe`, `train` or `evaluate`; a site answers with a description, an update, an evaluation, or a
refusal that carries a code and no text. Every message names the plan's SHA-256, so that a message of another study is
refused before anything is read. Decoding checks names and types of every field; what an update may hold is checked
against the adapter's layout by `fedtune.aggregation.validation`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedtune.errors import FedtuneError, MessageError
from fedtune.flower.arrays import from_record, payload_bytes, to_record
from fedtune.model.layout import AdapterState
from fedtune.privacy.accounting import Event

SCHEMA = 1
_HEADER = "fedtune"
_ARRAYS = "arrays"
_MAX_TEXT = 1_000_000
_MAX_CODE = 64
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Scalar = TypeVar("Scalar", str, int)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the coordinator sends: the plan's hash, the round (0 is before the first) and the adapter to start from."""

    plan_sha256: str
    round: int
    adapter: AdapterState


@dataclass(frozen=True, slots=True)
class Description:
    """Who a site is and what it has spent on this study: `units` is the public, rounded number of privacy units."""

    plan_sha256: str
    site: str
    units: int
    data_sha256: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """A site's adapter after its local steps; `events` are all mechanism events the site has spent in this study."""

    plan_sha256: str
    site: str
    round: int
    state: AdapterState
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A site's held-out tally: counts and sums that add up across sites."""

    plan_sha256: str
    site: str
    round: int
    tally: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A site's code for why it did not answer: never a message, because a message can quote private data."""

    code: str


def encode_instruction(instruction: Instruction) -> RecordDict:
    """Encode an instruction; the arrays are encoded once and may be shared between the messages of a round."""
    header = _header("instruction", instruction.plan_sha256, round=instruction.round)
    return RecordDict({_HEADER: header, _ARRAYS: to_record(instruction.adapter)})


def decode_instruction(content: RecordDict, plan_sha256: str) -> Instruction:
    """Decode an instruction of this plan, or refuse it."""
    header, arrays = _open(content, "instruction", plan_sha256)
    return Instruction(plan_sha256, _field(header, "round", int), _float32(arrays))


def encode_reply(reply: Description | Update | Evaluation | Refusal) -> RecordDict:
    """Encode a site's answer."""
    if isinstance(reply, Refusal):
        return RecordDict({_HEADER: ConfigRecord({"schema": SCHEMA, "kind": "refusal", "code": reply.code})})
    if isinstance(reply, Description):
        header = _header("description", reply.plan_sha256, site=reply.site, units=reply.units)
        header["data_sha256"] = reply.data_sha256
        header["events"] = _dump_events(reply.events)
        return RecordDict({_HEADER: header, _ARRAYS: to_record({})})
    if isinstance(reply, Update):
        header = _header("update", reply.plan_sha256, site=reply.site, round=reply.round)
        header["events"] = _dump_events(reply.events)
        return RecordDict({_HEADER: header, _ARRAYS: to_record(reply.state)})
    header = _header("evaluation", reply.plan_sha256, site=reply.site, round=reply.round)
    return RecordDict({_HEADER: header, _ARRAYS: to_record(reply.tally)})


def decode_description(content: RecordDict, plan_sha256: str) -> Description | Refusal:
    """Decode a description or a refusal."""
    if refusal := _refusal(content):
        return refusal
    header, _ = _open(content, "description", plan_sha256)
    site = _field(header, "site", str)
    if not _SITE_NAME.fullmatch(site):
        raise MessageError("wrong-field", "a site's name has other signs or is longer than the plan allows")
    return Description(
        plan_sha256,
        site,
        _field(header, "units", int),
        _field(header, "data_sha256", str),
        _load_events(_field(header, "events", str)),
    )


def decode_update(content: RecordDict, plan_sha256: str) -> Update | Refusal:
    """Decode an update or a refusal; the state is not validated here."""
    if refusal := _refusal(content):
        return refusal
    header, arrays = _open(content, "update", plan_sha256)
    events = _load_events(_field(header, "events", str))
    return Update(plan_sha256, _field(header, "site", str), _field(header, "round", int), _float32(arrays), events)


def decode_evaluation(content: RecordDict, plan_sha256: str) -> Evaluation | Refusal:
    """Decode an evaluation or a refusal."""
    if refusal := _refusal(content):
        return refusal
    header, arrays = _open(content, "evaluation", plan_sha256)
    return Evaluation(plan_sha256, _field(header, "site", str), _field(header, "round", int), arrays)


def refusal_of(error: Exception) -> Refusal:
    """Reduce an exception to its code; an unexpected one is `site.internal`, whatever it says."""
    return Refusal(error.code if isinstance(error, FedtuneError) else "site.internal")


def content_bytes(content: RecordDict) -> int:
    """Return the payload bytes of any message: its arrays and the text of its other records."""
    size = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            size += payload_bytes(record)
        else:
            size += sum(len(str(key)) + len(str(value)) for key, value in record.items())
    return size


def _header(kind: str, plan_sha256: str, **fields: str | int) -> ConfigRecord:
    return ConfigRecord({"schema": SCHEMA, "kind": kind, "plan_sha256": plan_sha256, **fields})


def _open(content: RecordDict, kind: str, plan_sha256: str) -> tuple[ConfigRecord, dict[str, NDArray[Any]]]:
    header = _checked_header(content)
    if _field(header, "kind", str) != kind:
        raise MessageError("wrong-kind", f"expected a message of kind {kind!r}")
    if _field(header, "plan_sha256", str) != plan_sha256:
        raise MessageError("other-plan", "the message belongs to another study plan")
    arrays = content.get(_ARRAYS)
    if set(content) != {_HEADER, _ARRAYS} or not isinstance(arrays, ArrayRecord):
        raise MessageError("wrong-records", f"a message of kind {kind!r} holds one header and one array record")
    return header, from_record(arrays)


def _checked_header(content: RecordDict) -> ConfigRecord:
    header = content.get(_HEADER)
    if not isinstance(header, ConfigRecord) or header.get("schema") != SCHEMA:
        raise MessageError("wrong-schema", f"the message is not of schema {SCHEMA}", hint="upgrade the older side")
    return header


def _refusal(content: RecordDict) -> Refusal | None:
    header = _checked_header(content)
    if header.get("kind") != "refusal":
        return None
    return Refusal(_field(header, "code", str)[:_MAX_CODE])


def _field(header: ConfigRecord, name: str, kind: type[Scalar]) -> Scalar:
    value = header.get(name)
    if type(value) is not kind or (isinstance(value, str) and len(value) > _MAX_TEXT):
        raise MessageError("wrong-field", f"field {name!r} is missing, too long or not {kind.__name__}")
    return value


def _float32(arrays: dict[str, NDArray[Any]]) -> AdapterState:
    for name, value in arrays.items():
        if value.dtype != np.float32:
            raise MessageError("wrong-dtype", f"adapter tensor {name!r} is {value.dtype}, not float32")
    return arrays


def _dump_events(events: tuple[Event, ...]) -> str:
    return json.dumps([event.to_dict() for event in events], sort_keys=True, separators=(",", ":"))


def _load_events(text: str) -> tuple[Event, ...]:
    try:
        return tuple(Event.from_dict(item) for item in json.loads(text))
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise MessageError("wrong-events", "the privacy events of a reply cannot be read") from error
