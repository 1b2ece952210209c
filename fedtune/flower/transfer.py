"""A message's bytes on their way: a root with everything small, and pieces of 5 MiB, of which a few are in memory.

Flower keeps a message as a tree of objects that are fetched one by one: message, content, each record, each array, and
pieces of an array's data. Its own functions hold all pieces beside the arrays, when they send and when they receive. A
hundred small matrices are two hundred requests, and each request is ten milliseconds of a SuperLink. Here a message is

    root:    Flower's `Message` with all records but arrays inside it, and a list of the arrays and pieces
    pieces:  Flower's `ArrayChunk`s of the arrays' bytes one after another, wherever one array ends

    memory when sending:    the message, and 4 pieces with their encodings
    memory when receiving:  the arrays that are whole, the next one, and 4 pieces with their encodings

A message as Flower itself makes them is received as well. Knows no connection, no study and no envelope: what travels
is not signed here, and what arrives is checked for nothing but its form.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_id, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

from fedtune.errors import MessageError
from fedtune.flower.memory import drop_young_cycles, give_back

PACKED = "packed"
_AT_A_TIME = 4  # pieces in memory; two are under way
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 1.0  # seconds between two looks for a piece that its sender is still sending
_WRONG = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, DecodeError)

Fetch = Callable[[str], bytes]
Push = Callable[[str, bytes], None]


class Parcels:
    """Messages that are sent together; arrays that several of them share are hashed and sent once.

    `add` gives a message its name and returns its tree, `send` pushes those objects that the receiver has not got. A
    message must not change in between.
    """

    def __init__(self) -> None:
        self._objects: dict[str, Callable[[], bytes]] = {}
        self._packed: dict[tuple[tuple[str, int], ...], _Packed] = {}

    def add(self, message: Message) -> ObjectTree:
        """Name a message by its hash and return the tree of its objects."""
        small, pieces = message, list[str]()
        if message.has_content():
            content, pieces = self._pack(message.content)
            small = make_message(message.metadata, content)
        root = _root(small, pieces)
        name = get_object_id(root)
        message.metadata.__dict__["_message_id"] = name
        self._objects[name] = lambda: root
        return ObjectTree(object_id=name, children=[ObjectTree(object_id=piece) for piece in pieces])

    def send(self, wanted: Collection[str], push: Push) -> None:
        """Push the wanted objects, each of them made when its turn comes and dropped after it; roots after pieces."""
        turn = iter([name for name in self._objects if name in wanted])
        while names := list(islice(turn, _AT_A_TIME)):
            push_object_contents_from_iterable(((name, self._objects[name]()) for name in names), push)
            drop_young_cycles()
        give_back()

    def _pack(self, content: RecordDict) -> tuple[RecordDict, list[str]]:
        """Return a content with a list in place of its arrays, and the names of their pieces."""
        if PACKED in content:
            raise ValueError("the message is packed already")
        arrays = {name: record for name, record in content.items() if isinstance(record, ArrayRecord) and record}
        if not arrays:
            return content, []
        same = tuple((name, id(record)) for name, record in arrays.items())
        if same not in self._packed:
            self._packed[same] = _Packed.of(arrays)
            self._objects |= self._packed[same].pieces
        small = {name: record for name, record in content.items() if name not in arrays}
        return RecordDict({**small, PACKED: self._packed[same].list}), list(self._packed[same].pieces)


def receive(tree: ObjectTree, fetch: Fetch, root: bytes | None = None) -> Message:
    """Return the message of a tree; `fetch` gets one object, `root` is the tree's if it has been fetched.

    A piece that is still on its way to where it is fetched is waited for. Errors: `message.unreadable`, and what
    `fetch` raises for an object that is not there.
    """
    root = _fetched([tree.object_id], fetch)[tree.object_id] if root is None else root
    try:
        proto = ProtoMessage.FromString(get_object_body(root, Message))
        packed = proto.HasField("content") or proto.HasField("error")
        message = message_from_proto(proto) if packed else _of_flowers_own(tree, fetch)
        if message.has_content() and PACKED in message.content:
            message.content = _unpacked(message.content, {child.object_id for child in tree.children}, fetch)
    except _WRONG as error:
        raise _unreadable() from error
    message.metadata.__dict__["_message_id"] = tree.object_id
    give_back()
    return message


class _Packed(NamedTuple):
    """Array records as pieces, each by its name, and the list that a receiver needs; holds the records themselves."""

    list: ConfigRecord
    pieces: dict[str, Callable[[], bytes]]
    arrays: dict[str, ArrayRecord]  # so that their ids are not used again

    @classmethod
    def of(cls, arrays: dict[str, ArrayRecord]) -> _Packed:
        data = _Concatenation([array.data for record in arrays.values() for array in record.values()])
        order, pieces = list[str](), dict[str, Callable[[], bytes]]()
        for start in range(0, len(data), FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE):
            piece = data.piece(start)
            order.append(get_object_id(piece()))
            pieces[order[-1]] = piece
        entries = [
            [name, key, array.dtype, array.shape, array.stype, len(array.data)]
            for name, record in arrays.items()
            for key, array in record.items()
        ]
        text = json.dumps({"arrays": entries, "pieces": order}, separators=(",", ":"))
        return cls(ConfigRecord({"list": text}), pieces, arrays)


class _Concatenation:
    """Many byte strings as one, which is never made."""

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._parts = [memoryview(part) for part in parts]
        self._starts = list(accumulate(map(len, self._parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def piece(self, start: int) -> Callable[[], bytes]:
        """Return what makes the piece that begins there, each time it is asked."""
        end = start + FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
        return lambda: ArrayChunk(memoryview(self._read(start, end))).deflate()

    def _read(self, start: int, end: int) -> bytes:
        found, number = [], bisect_right(self._starts, start) - 1
        while start < min(end, len(self)):
            offset = start - self._starts[number]
            found.append(self._parts[number][offset : offset + end - start])
            start, number = start + len(found[-1]), number + 1
        return b"".join(found)


def _root(message: Message, pieces: Iterable[str]) -> bytes:
    """Return a message as Flower writes objects (kind, children, length, a zero byte, body), its records inside it."""
    proto = message_to_proto(message)
    proto.metadata.message_id = ""  # which is the hash of this
    body: bytes = proto.SerializeToString(deterministic=True)
    return f"Message {','.join(pieces)} {len(body)}".encode() + b"\0" + body


def _of_flowers_own(tree: ObjectTree, fetch: Fetch) -> Message:
    contents = _fetched(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)), fetch)
    message = inflate_object_from_contents(tree.object_id, contents)
    if not isinstance(message, Message):
        raise TypeError("another object")
    return message


def _unpacked(content: RecordDict, pieces: set[str], fetch: Fetch) -> RecordDict:
    """Return a content with its arrays."""
    told = json.loads(str(content[PACKED]["list"]))
    entries, order = [_entry(*entry) for entry in told["arrays"]], [str(piece) for piece in told["pieces"]]
    if set(order) != pieces:
        raise ValueError("other pieces than the tree has")
    records = {name: record for name, record in content.items() if name != PACKED}
    if any(name in records for name, *_ in entries):
        raise ValueError("two records of one name")
    parts = _cut(_bodies(order, fetch), [size for *_, size in entries])
    arrays: dict[str, ArrayRecord] = {}
    for (name, key, dtype, shape, stype, _), part in zip(entries, parts, strict=True):
        arrays.setdefault(name, ArrayRecord())[key] = Array(dtype, shape, stype, part)
    return RecordDict({**records, **arrays})


def _entry(name: str, key: str, dtype: str, shape: list[int], stype: str, size: int) -> tuple[Any, ...]:
    """Check what a list says of one array."""
    if type(size) is not int or size < 0:
        raise ValueError("no size")
    return str(name), str(key), str(dtype), tuple(map(int, shape)), str(stype), size


def _fetched(names: Iterable[str], fetch: Fetch) -> dict[str, bytes]:
    return pull_objects(list(names), fetch, initial_backoff=_FIRST_WAIT, backoff_cap=_LONGEST_WAIT)


def _bodies(names: Sequence[str], fetch: Fetch) -> Iterator[bytes]:
    """Yield the data of pieces in their order."""
    turn = iter(names)
    while batch := list(islice(turn, _AT_A_TIME)):
        contents = _fetched(dict.fromkeys(batch), fetch)
        for name in batch:
            yield get_object_body(contents[name], ArrayChunk)
        del contents
        drop_young_cycles()


def _cut(flow: Iterator[bytes], sizes: Sequence[int]) -> Iterator[bytes]:
    """Yield the bytes of a flow in parts of these sizes, which must be all of it."""
    left = memoryview(b"")
    for size in sizes:
        found, missing = list[memoryview](), size
        while missing:
            left = left or _view(flow)
            if not left:
                raise ValueError("too few bytes")
            found.append(left[:missing])
            left, missing = left[len(found[-1]) :], missing - len(found[-1])
        yield b"".join(found)
    if left or _view(flow):
        raise ValueError("too many bytes")


def _view(flow: Iterator[bytes]) -> memoryview:
    return memoryview(next(flow, b""))


def _unreadable() -> MessageError:
    return MessageError("unreadable", "a message's objects do not fit together", hint="upgrade the older side")
