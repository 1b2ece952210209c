from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import array as flowers_array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import MessageError
from fedtune.flower import transfer
from fedtune.flower.body import body_digest
from fedtune.flower.transfer import Parcels, receive

PIECE = 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    set_pieces(monkeypatch, PIECE)


def set_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(transfer, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", size)
    monkeypatch.setattr(flowers_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", size)


def array(data: bytes, shape: tuple[int, ...] | None = None, kind: str = "uint8") -> Array:
    return Array(kind, (len(data),) if shape is None else shape, "raw", data)


def record(**arrays: bytes) -> ArrayRecord:
    made = ArrayRecord()
    for name, data in arrays.items():
        made[name] = array(data)
    return made


def sent(*contents: RecordDict) -> tuple[list[ObjectTree], dict[str, bytes]]:
    """Send messages of these contents to a store that has nothing."""
    parcels, store = Parcels(), dict[str, bytes]()
    trees = [parcels.add(Message(content, 5, "train", ttl=60.0)) for content in contents]
    names = {node.object_id for tree in trees for node in iterate_object_tree(tree)}
    parcels.send(names, lambda name, data: store.update({name: data}))
    assert store.keys() == names
    return trees, store


contents = st.dictionaries(
    st.sampled_from(["arrays", "others", "envelope", "fedtune"]),
    st.dictionaries(st.text(max_size=3), st.binary(max_size=3 * PIECE), max_size=4),
    max_size=3,
)


@given(contents, st.dictionaries(st.sampled_from("xyz"), st.binary(max_size=PIECE), max_size=2))
def test_what_is_received_is_what_was_sent(arrays: dict[str, dict[str, bytes]], config: dict[str, bytes]) -> None:
    records = {name: ArrayRecord({key: array(data) for key, data in inner.items()}) for name, inner in arrays.items()}
    content = RecordDict({**records, "c": ConfigRecord(dict(config)), "m": MetricRecord({"n": 1.5})})
    (tree,), store = sent(content)
    received = receive(tree, store.__getitem__)
    assert received.content == content
    assert body_digest(received.content) == body_digest(content)
    assert received.metadata.message_id == tree.object_id


def test_shapes_types_and_order_of_arrays_are_kept() -> None:
    values = np.arange(24, dtype="<f8").reshape(2, 3, 4)
    made = ArrayRecord()
    made["z"] = Array("float64", values.shape, "fedtune.raw-le", values.tobytes())
    made["a"] = Array("float32", (0, 7), "fedtune.raw-le", b"")
    made["scalar"] = Array("int64", (), "fedtune.raw-le", b"8 bytes!")
    (tree,), store = sent(RecordDict({"x": made}))
    found = receive(tree, store.__getitem__).content["x"]
    assert isinstance(found, ArrayRecord)
    assert list(found) == ["z", "a", "scalar"]
    assert [(one.dtype, one.shape) for one in found.values()] == [
        ("float64", (2, 3, 4)),
        ("float32", (0, 7)),
        ("int64", ()),
    ]
    assert found["z"].data == values.tobytes()


def test_an_error_travels_without_content() -> None:
    asked = Message(RecordDict(), 5, "train", ttl=60.0)
    asked.metadata.__dict__["_message_id"] = "m"
    parcels, store = Parcels(), dict[str, bytes]()
    tree = parcels.add(Message(Error(2, "data.missing-column"), reply_to=asked))
    parcels.send({tree.object_id}, lambda name, data: store.update({name: data}))
    received = receive(tree, store.__getitem__)
    assert (received.error.code, received.error.reason) == (2, "data.missing-column")
    assert received.metadata.reply_to_message_id == "m"


def test_many_small_arrays_take_as_few_objects_as_one_large() -> None:
    many = {f"a{number}": bytes([number]) * PIECE for number in range(100)}
    (packed,), _ = sent(RecordDict({"x": record(**many), "c": ConfigRecord({"n": 1})}))
    flowers = get_object_tree(Message(RecordDict({"x": record(**many)}), 5, "train", ttl=60.0))
    assert len(list(iterate_object_tree(packed))) == 100 + 1
    assert len(list(iterate_object_tree(flowers))) == 200 + 3


def test_a_message_without_arrays_is_one_object() -> None:
    (tree,), store = sent(RecordDict({"c": ConfigRecord({"n": 1}), "x": ArrayRecord()}))
    assert list(store) == [tree.object_id]
    assert receive(tree, store.__getitem__).content == RecordDict({"c": ConfigRecord({"n": 1}), "x": ArrayRecord()})


def test_arrays_that_messages_share_are_sent_once() -> None:
    shared = record(w=bytes(range(200)))
    contents = [RecordDict({"x": shared, "c": ConfigRecord({"receipt": number})}) for number in range(10)]
    trees, store = sent(*contents)
    pieces = [name for name, data in store.items() if data.startswith(b"ArrayChunk ")]
    assert len(pieces) == 4
    assert [receive(tree, store.__getitem__).content for tree in trees] == contents


def test_only_what_the_receiver_has_not_got_is_sent() -> None:
    parcels, store = Parcels(), dict[str, bytes]()
    tree = parcels.add(Message(RecordDict({"x": record(w=b"data")}), 5, "train", ttl=60.0))
    parcels.send({tree.object_id}, lambda name, data: store.update({name: data}))
    assert list(store) == [tree.object_id]


def test_pieces_with_the_same_bytes_are_one() -> None:
    (tree,), store = sent(RecordDict({"x": record(zeros=bytes(10 * PIECE))}))
    assert sum(data.startswith(b"ArrayChunk ") for data in store.values()) == 1
    assert receive(tree, store.__getitem__).content == RecordDict({"x": record(zeros=bytes(10 * PIECE))})


def test_flowers_stores_take_what_is_sent() -> None:
    (tree,), store = sent(RecordDict({"x": record(a=b"a" * 100, b=b"b" * 50), "c": ConfigRecord({"n": 1})}))
    objects = InMemoryObjectStore()
    assert set(objects.preregister(1, tree)) == store.keys()
    for name, data in store.items():
        objects.put(name, data)
    assert receive(objects.get_object_tree(tree.object_id), store.__getitem__).content["c"] == ConfigRecord({"n": 1})


def test_what_flower_itself_has_sent_is_received() -> None:
    content = RecordDict({"x": record(a=b"a" * 100, twin=b"a" * 100, empty=b""), "c": ConfigRecord({"n": 1})})
    message = Message(content, 5, "train", ttl=60.0)
    store = {name: thing.deflate() for name, thing in get_all_nested_objects(message).items()}
    assert receive(get_object_tree(message), store.__getitem__).content == content


def test_a_content_that_is_named_as_if_it_were_packed_is_not_sent() -> None:
    with pytest.raises(ValueError, match="packed already"):
        sent(RecordDict({"packed": record(a=b"x")}))


def told(**changes: object) -> str:
    """Return a list of two arrays in three pieces, changed."""
    arrays = [["x", "a", "uint8", [100], "raw", 100], ["x", "b", "uint8", [50], "raw", 50]]
    return json.dumps({"arrays": arrays, "pieces": PIECES} | changes)


DATA = b"a" * 100 + b"b" * 50
CHUNKS = {get_object_id(chunk): chunk for chunk in (
    ArrayChunk(memoryview(DATA[start : start + PIECE])).deflate() for start in range(0, 150, PIECE)
)}  # fmt: skip
PIECES = list(CHUNKS)


def open_list(text: object, others: dict[str, ConfigRecord] | None = None) -> RecordDict:
    """Receive a message whose sender has written this list of its arrays."""
    content = RecordDict({"packed": ConfigRecord({"list": text}), **(others or {})})  # type: ignore[dict-item]
    root = transfer._root(Message(content, 5, "train", ttl=60.0), CHUNKS)
    tree = ObjectTree(object_id="r", children=[ObjectTree(object_id=name) for name in CHUNKS])
    return receive(tree, {**CHUNKS, "r": root}.__getitem__).content


def test_the_list_that_is_changed_below_is_right() -> None:
    assert open_list(told()) == RecordDict({"x": record(a=b"a" * 100, b=b"b" * 50)})


@pytest.mark.parametrize(
    "text",
    [
        told(arrays=[["x", "a", "uint8", [100], "raw", 100]]),
        told(arrays=[["x", "a", "uint8", [150], "raw", 151]]),
        told(arrays=[["x", "a", "uint8", [150], "raw", 150], ["x", "b", "uint8", [1], "raw", -1]]),
        told(arrays=[["x", "a", "uint8", [150], "raw", 150.0]]),
        told(arrays=[["x", "a", "uint8", [150], "raw", True]]),
        told(arrays=[["x", "a", "uint8", [150], "raw", 10**30]]),
        told(arrays=[["x", "a", "uint8", 150, "raw", 150]]),
        told(arrays=[["x", "a", "uint8", ["many"], "raw", 150]]),
        told(arrays=[["x", "a", "uint8", [150], "raw"]]),
        told(arrays=[["c", "a", "uint8", [150], "raw", 150]]),  # the name of another record
        told(arrays=7),
        told(pieces=PIECES[:2]),
        told(pieces=[*PIECES, "f" * 64]),
        told(pieces=None),
        "{}",
        "no json",
        "[" * 100_000,
        "",
        7,
        b"bytes",
    ],
)
def test_a_list_that_does_not_fit_the_pieces_is_refused(text: object) -> None:
    with pytest.raises(MessageError) as caught:
        open_list(text, {"c": ConfigRecord({"n": 1})})
    assert caught.value.code == "message.unreadable"


def test_a_packed_record_of_another_kind_is_refused() -> None:
    root = transfer._root(Message(RecordDict({"packed": record(a=b"x")}), 5, "train", ttl=60.0), [])
    with pytest.raises(MessageError):
        receive(ObjectTree(object_id="r"), {"r": root}.__getitem__)


@pytest.mark.parametrize("instead", [b"MetricRecord  0\0", b"ArrayChunk  1\0x", b"no head", b"", b"Message  3\0abc"])
def test_objects_that_are_something_else_are_refused(instead: bytes) -> None:
    (tree,), store = sent(RecordDict({"x": record(a=b"a" * 100)}))
    for name in store:
        with pytest.raises(MessageError) as caught:
            receive(tree, (store | {name: instead}).__getitem__)
        assert caught.value.code == "message.unreadable"


def test_a_piece_that_is_on_its_way_is_waited_for_and_one_that_is_lost_is_not() -> None:
    (tree,), store = sent(RecordDict({"x": record(a=b"a" * 300)}))
    asked = list[str]()

    def late(name: str) -> bytes:
        asked.append(name)
        if asked.count(name) == 1:
            raise ObjectUnavailableError(name)
        return store[name]

    assert receive(tree, late).content == RecordDict({"x": record(a=b"a" * 300)})
    lost = next(name for name, data in store.items() if data.startswith(b"ArrayChunk"))

    def gone(name: str) -> bytes:
        if name == lost:
            raise ObjectPullError(name, "gone")
        return store[name]

    with pytest.raises(ObjectPullError):
        receive(tree, gone)


def peak_beside(work: Callable[[], object]) -> int:
    """Return the largest number of bytes that were allocated at a time by some work."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


SIZE, LARGE_PIECE = 8_000_000, 50_000


def test_sending_takes_a_few_pieces_of_memory_and_flowers_own_way_a_whole_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    set_pieces(monkeypatch, LARGE_PIECE)
    content = RecordDict({"x": record(w=np.random.default_rng(1).bytes(SIZE))})
    message = Message(content, 5, "train", ttl=60.0)

    def send() -> None:
        parcels = Parcels()
        tree = parcels.add(message)
        parcels.send({node.object_id for node in iterate_object_tree(tree)}, push)

    def push(name: str, data: bytes) -> None:
        time.sleep(0.002)  # a connection is slower than memory

    assert peak_beside(send) < 20 * LARGE_PIECE
    assert peak_beside(lambda: push_objects(get_all_nested_objects(message), push)) > 0.9 * SIZE


def test_receiving_takes_one_copy_of_memory_and_flowers_own_way_more_than_two(monkeypatch: pytest.MonkeyPatch) -> None:
    set_pieces(monkeypatch, LARGE_PIECE)
    matrices = {f"m{number}": np.random.default_rng(number).bytes(SIZE // 40) for number in range(40)}
    (tree,), store = sent(RecordDict({"x": record(**matrices)}))

    def fetch(name: str) -> bytes:
        return bytes(bytearray(store[name]))  # as from a connection

    assert peak_beside(lambda: receive(tree, fetch)) < SIZE + 20 * LARGE_PIECE
    message = Message(RecordDict({"x": record(**matrices)}), 5, "train", ttl=60.0)
    tree, store = get_object_tree(message), {name: o.deflate() for name, o in get_all_nested_objects(message).items()}
    names = [node.object_id for node in iterate_object_tree(tree)]
    assert peak_beside(lambda: inflate_object_from_contents(tree.object_id, pull_objects(names, fetch))) > 1.9 * SIZE
