"""The messages of one study, schema 2: what a coordinator asks and what a site answers.

An instruction is `describe`, `train` or `evaluate`; a site answers with a description, an update, an evaluation, or a
refusal that carries a code and no text. Every message names the plan's SHA-256, so that a message of another study is
refused before anything is read. An instruction carries the newest receipt that the coordinator keeps of the site's
journal, and every answer but a refusal the journal's signed head. Decoding checks names and types of every field; what
an update may hold is checked against the adapter's layout by `fedtune.aggregation.validation`, signatures of heads and
receipts by whoever uses them.
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
from fedtune.journal.witness import Head, Receipt
from fedtune.model.layout import AdapterState
from fedtune.privacy.accounting import Event

SCHEMA = 2
_HEADER = "fedtune"
_ARRAYS = "arrays"
_RECEIPT = "receipt"
_MAX_TEXT = 1_000_000
_MAX_CODE = 64
LACKS_STATE = "message.lacks-state"  # what a site says that has not kept what a message builds on
CODE = re.compile(r"[a-z]{1,20}\.[a-z0-9-]{1,43}")
_MARK = re.compile(r"[0-9a-f]{16,64}")
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Scalar = TypeVar("Scalar", str, int)
Signed = TypeVar("Signed", Head, Receipt)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the coordinator takes a site to stand: the part of a message that is the site's own.

    `part` counts the exchanges of a round from 0, `rank` is the site's (0 is the plan's), `counted` the last round
    whose update of this site was taken. The arrays are what has changed after round `since`, on top of the state that
    the site keeps under `base` (nothing but the plan where it is empty); what they make is to be kept under `mark`.
    """

    part: int = 0
    rank: int = 0
    counted: int = 0
    since: int = 0
    base: str = ""
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the coordinator sends: the plan's hash, the round (0 is before the first) and the adapter to start from.

    `receipt` is the newest that the coordinator keeps of the site's journal, None where it has none or does not know
    the site yet; a site whose journal does not extend it refuses before it reads or spends anything.
    """

    plan_sha256: str
    round: int
    adapter: AdapterState
    receipt: Receipt | None = None
    standing: Standing = Standing()


@dataclass(frozen=True, slots=True)
class Description:
    """Who a site is and what it has spent on this study: `units` is the public, rounded number of privacy units.

    `rank` is the largest that its machine holds, where the plan leaves that to the sites, else 0.
    """

    plan_sha256: str
    site: str
    units: int
    data_sha256: str
    events: tuple[Event, ...]
    head: Head
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Update:
    """What a site sends after its local steps; `events` are all mechanism events the site has spent in this study.

    `state` holds float32 tensors, or the bytes of the plan's codec.
    """

    plan_sha256: str
    site: str
    round: int
    state: Mapping[str, NDArray[Any]]
    events: tuple[Event, ...]
    head: Head
    part: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A site's held-out tally: counts and sums that add up across sites."""

    plan_sha256: str
    site: str
    round: int
    tally: Mapping[str, NDArray[Any]]
    head: Head


@dataclass(frozen=True, slots=True)
class Refusal:
    """A site's code for why it did not answer: never a message, because a message can quote private data."""

    code: str


def encode_instruction(instruction: Instruction) -> RecordDict:
    """Encode an instruction."""
    return encode_instructions({0: instruction})[0]


def encode_instructions(instructions: Mapping[int, Instruction]) -> dict[int, RecordDict]:
    """Encode the instructions of a round by node; those with the same adapter, as an object, share its record."""
    arrays = {id(one.adapter): one.adapter for one in instructions.values()}
    records = {key: to_record(adapter) for key, adapter in arrays.items()}
    return {node: _encoded(one, records[id(one.adapter)]) for node, one in instructions.items()}


def _encoded(instruction: Instruction, arrays: ArrayRecord) -> RecordDict:
    standing = _dump(_values(instruction.standing))  # one field: each costs as much as a signature does
    header = _header("instruction", instruction.plan_sha256, round=instruction.round, standing=standing)
    return with_receipt(RecordDict({_HEADER: header, _ARRAYS: arrays}), instruction.receipt)


def with_receipt(content: RecordDict, receipt: Receipt | None) -> RecordDict:
    """Return an encoded instruction that carries a receipt: a new message over the same header and arrays."""
    if receipt is None:
        return content
    return RecordDict({**content, _RECEIPT: ConfigRecord({"receipt": _dump(receipt.to_dict())})})


def decode_instruction(content: RecordDict, plan_sha256: str) -> Instruction:
    """Decode an instruction of this plan, or refuse it."""
    others = RecordDict({name: record for name, record in content.items() if name != _RECEIPT})
    header, arrays = _open(others, "instruction", plan_sha256)
    number = _field(header, "round", int)
    return Instruction(plan_sha256, number, _float32(arrays), _receipt(content), _standing(header))


def encode_reply(reply: Description | Update | Evaluation | Refusal) -> RecordDict:
    """Encode a site's answer."""
    if isinstance(reply, Refusal):
        return RecordDict({_HEADER: ConfigRecord({"schema": SCHEMA, "kind": "refusal", "code": reply.code})})
    if isinstance(reply, Description):
        header = _header("description", reply.plan_sha256, site=reply.site, units=reply.units, rank=reply.rank)
        header["data_sha256"] = reply.data_sha256
        header["events"] = _dump_events(reply.events)
        header["head"] = _dump(reply.head.to_dict())
        return RecordDict({_HEADER: header, _ARRAYS: to_record({})})
    if isinstance(reply, Update):
        header = _header("update", reply.plan_sha256, site=reply.site, round=reply.round, part=reply.part)
        header["events"] = _dump_events(reply.events)
        header["head"] = _dump(reply.head.to_dict())
        return RecordDict({_HEADER: header, _ARRAYS: to_record(reply.state)})
    header = _header("evaluation", reply.plan_sha256, site=reply.site, round=reply.round)
    header["head"] = _dump(reply.head.to_dict())
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
        _head(header),
        _field(header, "rank", int),
    )


def decode_update(content: RecordDict, plan_sha256: str) -> Update | Refusal:
    """Decode an update or a refusal; the state is not validated here."""
    if refusal := _refusal(content):
        return refusal
    header, arrays = _open(content, "update", plan_sha256)
    site, number = _field(header, "site", str), _field(header, "round", int)
    events = _load_events(_field(header, "events", str))
    return Update(plan_sha256, site, number, _numbers(arrays), events, _head(header), _field(header, "part", int))


def decode_evaluation(content: RecordDict, plan_sha256: str) -> Evaluation | Refusal:
    """Decode an evaluation or a refusal."""
    if refusal := _refusal(content):
        return refusal
    header, arrays = _open(content, "evaluation", plan_sha256)
    site, number = _field(header, "site", str), _field(header, "round", int)
    return Evaluation(plan_sha256, site, number, arrays, _head(header))


def unsigned_code(content: RecordDict) -> str:
    """Return the code of a bare refusal, such as a site sends that could not tell who had asked it; else nothing.

    It is a label for people and proves nothing.
    """
    try:
        refusal = _refusal(content)
    except MessageError:
        return ""
    return refusal.code if refusal is not None and CODE.fullmatch(refusal.code) else ""


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


def _numbers(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Let through what an update may be written in; which of the two the plan says is checked with the layout."""
    for name, value in arrays.items():
        if value.dtype not in {np.dtype(np.float32), np.dtype(np.uint8)}:
            raise MessageError("wrong-dtype", f"adapter tensor {name!r:.80} is {value.dtype}")
    return arrays


def _standing(header: ConfigRecord) -> Standing:
    kinds = [type(value) for value in _values(Standing())]
    try:
        values = json.loads(_field(header, "standing", str))
    except (ValueError, RecursionError) as error:
        raise _bad_standing() from error
    if not isinstance(values, list) or [type(value) for value in values] != kinds:
        raise _bad_standing()
    found = Standing(*values)
    if min(found.part, found.rank, found.counted, found.since) < 0:
        raise _bad_standing()
    if any(mark and not _MARK.fullmatch(mark) for mark in (found.base, found.mark)):
        raise _bad_standing()
    return found


def _values(standing: Standing) -> list[int | str]:
    return [standing.part, standing.rank, standing.counted, standing.since, standing.base, standing.mark]


def _bad_standing() -> MessageError:
    return MessageError("wrong-field", "where the coordinator takes the site to stand cannot be read")


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _dump_events(events: tuple[Event, ...]) -> str:
    return _dump([event.to_dict() for event in events])


def _load_events(text: str) -> tuple[Event, ...]:
    try:
        return tuple(Event.from_dict(item) for item in json.loads(text))
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise MessageError("wrong-events", "the privacy events of a reply cannot be read") from error


def _head(header: ConfigRecord) -> Head:
    return _signed(Head, _field(header, "head", str))


def _receipt(content: RecordDict) -> Receipt | None:
    record = content.get(_RECEIPT)
    if record is None:
        return None
    if not isinstance(record, ConfigRecord) or set(record) != {"receipt"}:
        raise MessageError("wrong-records", "the third record of an instruction holds a receipt and nothing else")
    return _signed(Receipt, _field(record, "receipt", str))


def _signed(kind: type[Signed], text: str) -> Signed:
    try:
        return kind.from_dict(json.loads(text))
    except (FedtuneError, ValueError, RecursionError) as error:
        raise MessageError("wrong-head", "the journal's head or receipt in a message cannot be read") from error
