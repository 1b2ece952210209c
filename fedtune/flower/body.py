"""The one sequence of bytes, and the hash, of what a message holds: what an envelope signs.

A record's bytes are LABEL, its kind (`A`rray, `C`onfig, `M`etric), and its entries by name (in the order of their UTF-8
bytes): name, one letter for the value's type, value. Numbers are 8 bytes, big-endian; every text, byte string and list
is preceded by its length, so that no two records have the same bytes. The body's hash is the SHA-256 of the label and
each record's name and own SHA-256, so a round's adapter is hashed once for all sites. Arrays are fed to the hash where
they lie. Knows no envelope and no message.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedtune.errors import EnvelopeError

LABEL = b"fedtune body v1\n"
Record: TypeAlias = ArrayRecord | ConfigRecord | MetricRecord
_KINDS: dict[bytes, type[Record]] = {b"A": ArrayRecord, b"C": ConfigRecord, b"M": MetricRecord}


class Digests:
    """Hashes of bodies; array records that several of them share are hashed once, and must not change meanwhile."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Record, bytes]] = {}  # the record itself, so that its id is not used again

    def of(self, content: RecordDict) -> str:
        """Return the SHA-256 of a body. Error: `envelope.bad-body` for what no message of ours can hold."""
        found = hashlib.sha256(LABEL + _number(len(content)))
        for name in sorted(content, key=_utf8):
            found.update(_text(name) + self._record(content[name]))
        return found.hexdigest()

    def _record(self, record: Record) -> bytes:
        known = self._known.get(id(record))
        if known is not None:
            return known[1]
        digest = record_digest(record)
        if isinstance(record, ArrayRecord):
            self._known[id(record)] = (record, digest)
        return digest


def body_digest(content: RecordDict) -> str:
    """Return the SHA-256 of one body. Error: `envelope.bad-body`."""
    return Digests().of(content)


def record_digest(record: Record) -> bytes:
    """Return the SHA-256 of a record's bytes. Error: `envelope.bad-body`."""
    found = hashlib.sha256()
    for part in record_parts(record):
        found.update(part)
    return found.digest()


def record_parts(record: Record) -> Iterator[bytes]:
    """Yield a record's bytes in parts, an array's data as a part by itself, not copied. Error: `envelope.bad-body`."""
    kind = next((letter for letter, kind in _KINDS.items() if type(record) is kind), None)
    if kind is None:
        raise _bad()
    yield LABEL + kind + _number(len(record))
    for name in sorted(record, key=_utf8):
        yield _text(name)
        yield from _value(record[name])


def read_record(raw: bytes) -> Record:
    """Return the record that has these bytes. Error: `envelope.bad-body`."""
    reader = _Reader(raw)
    try:
        kind = reader.take(len(LABEL) + 1).removeprefix(LABEL)
        record: Any = _KINDS[kind]()
        for _ in range(reader.number()):
            name = reader.text()
            record[name] = reader.value()
    except (KeyError, TypeError, ValueError, struct.error, RecursionError) as error:
        raise _bad() from error
    if b"".join(record_parts(record)) != raw:
        raise _bad()
    return cast(Record, record)


def frame(content: RecordDict) -> bytes:
    """Return the small part of a body: all but its arrays."""
    small = {name: b"".join(record_parts(record)) for name, record in content.items() if not _is_large(record)}
    return b"".join(_text(name) + _blob(raw) for name, raw in sorted(small.items()))


def refill(small: bytes, content: RecordDict) -> RecordDict:
    """Return the body of that frame with the arrays of another."""
    reader, records = _Reader(small), {name: record for name, record in content.items() if _is_large(record)}
    while reader.left():
        name = reader.text()
        records[name] = read_record(reader.blob())
    return RecordDict(records)


def in_order(content: RecordDict) -> RecordDict:
    """Return the same body with every entry in its place by name, so that equal hashes mean equal bodies."""
    return RecordDict({name: _in_order(content[name]) for name in sorted(content, key=_utf8)})


class _Reader:
    """Reads what `record_parts` writes."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0

    def left(self) -> bool:
        return self._at < len(self._raw)

    def take(self, size: int) -> bytes:
        part = self._raw[self._at : self._at + size]
        if size < 0 or len(part) != size:
            raise ValueError("too short")
        self._at += size
        return part

    def number(self) -> int:
        return int(struct.unpack(">q", self.take(8))[0])

    def blob(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        return self.blob().decode()

    def value(self) -> Any:
        letter = self.take(1)
        if letter == b"a":
            dtype, stype = self.text(), self.text()
            shape = tuple(self.number() for _ in range(self.number()))
            return Array(dtype, shape, stype, self.blob())
        if letter == b"l":
            return [self.value() for _ in range(self.number())]
        return {b"?": self._bool, b"i": self.number, b"d": self._float, b"s": self.text, b"b": self.blob}[letter]()

    def _bool(self) -> bool:
        return bool(self.number())

    def _float(self) -> float:
        return float(struct.unpack(">d", self.take(8))[0])


def _value(value: Any) -> Iterator[bytes]:
    match value:
        case Array():
            yield b"a" + _text(value.dtype) + _text(value.stype) + _shape(value.shape)
            yield _number(len(value.data))
            yield value.data
        case list():
            yield b"l" + _number(len(value))
            for item in value:
                yield from _value(item)
        case bool():
            yield b"?" + _number(int(value))
        case int():
            yield b"i" + _number(value)
        case float():
            yield b"d" + struct.pack(">d", value)
        case str():
            yield b"s" + _text(value)
        case bytes():
            yield b"b" + _blob(value)
        case _:
            raise _bad()


def _shape(value: Any) -> bytes:
    if not isinstance(value, (tuple, list)):  # what Flower received says what it likes
        raise _bad()
    return _number(len(value)) + b"".join(_number(size) for size in value)


def _number(value: Any) -> bytes:
    try:
        return struct.pack(">q", value)
    except struct.error as error:
        raise _bad() from error


def _text(value: Any) -> bytes:
    return _blob(_utf8(value))


def _utf8(value: Any) -> bytes:
    try:
        return bytes(value.encode())
    except (AttributeError, UnicodeEncodeError) as error:
        raise _bad() from error


def _blob(data: bytes) -> bytes:
    return _number(len(data)) + data


def _in_order(record: Any) -> Record:
    ordered = type(record)()
    for name in sorted(record, key=_utf8):
        ordered[name] = record[name]
    return cast(Record, ordered)


def _is_large(record: Record) -> bool:
    return isinstance(record, ArrayRecord)


def _bad() -> EnvelopeError:
    return EnvelopeError("bad-body", "a message holds what no message can hold", hint="upgrade the older side")
