"""A body has one sequence of bytes and one hash: whatever is changed in it changes both, the order of names neither."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st

from fedtune.flower.arrays import to_record
from fedtune.flower.body import Digests, Record, body_digest, frame, in_order, read_record, record_parts, refill
from tests.support.parties import code_of, refused

int64 = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = int64 | st.floats(allow_nan=False)
arrays = st.builds(
    Array, dtype=texts, shape=st.lists(int64, max_size=4).map(tuple), stype=texts, data=st.binary(max_size=20)
)
scalars: list[st.SearchStrategy[Any]] = [
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    texts,
    st.binary(max_size=8),
    st.booleans(),
]


def array_record(values: dict[str, Array]) -> ArrayRecord:
    record = ArrayRecord()
    for name, value in values.items():
        record[name] = value
    return record


def metric_record(values: dict[str, Any]) -> MetricRecord:
    return MetricRecord(values)


records: st.SearchStrategy[Record] = st.one_of(
    st.dictionaries(texts, arrays, max_size=3).map(array_record),
    st.dictionaries(
        texts, st.one_of([*scalars, *(st.lists(scalar, max_size=3) for scalar in scalars)]), max_size=4
    ).map(ConfigRecord),
    st.dictionaries(texts, st.one_of(int64, st.floats(allow_nan=False), st.lists(int64, max_size=3)), max_size=3).map(
        metric_record
    ),
)
bodies = st.dictionaries(texts, records, max_size=4).map(RecordDict)


def raw(record: Record) -> bytes:
    return b"".join(record_parts(record))


def backwards(content: RecordDict) -> RecordDict:
    turned = RecordDict()
    for name in reversed(list(content)):
        turned[name] = type(content[name])()
        for entry in reversed(list(content[name])):
            turned[name][entry] = content[name][entry]  # type: ignore[index]
    return turned


@given(records)
def test_a_record_comes_back_from_its_bytes_so_no_two_records_have_the_same(record: Record) -> None:
    found = read_record(raw(record))
    assert type(found) is type(record)
    assert dict(found) == dict(record)
    assert [type(found[name]) for name in record] == [type(record[name]) for name in record]


@given(bodies)
def test_the_order_of_names_does_not_count_and_comes_out_as_one(content: RecordDict) -> None:
    other = backwards(content)
    assert body_digest(other) == body_digest(content) == body_digest(in_order(other))
    for name, record in in_order(other).items():
        assert list(record) == list(in_order(content)[name])
    assert list(in_order(other)) == list(in_order(content))


@given(bodies)
def test_a_body_that_travelled_through_flower_has_the_same_hash(content: RecordDict) -> None:
    parts = {name: part.deflate() for name, part in get_all_nested_objects(content).items()}
    received: Any = inflate_object_from_contents(content.object_id, parts)
    assert body_digest(received) == body_digest(content)


def update(**array: Any) -> RecordDict:
    honest: dict[str, Any] = {"dtype": "float32", "shape": (2, 1), "stype": "raw", "data": bytes(range(8))}
    header = ConfigRecord({"schema": 1, "kind": "update", "round": 3})
    return RecordDict({"fedtune": header, "arrays": array_record({"w": Array(**{**honest, **array})})})


def test_every_bit_of_an_array_counts() -> None:
    for bit in range(64):
        data = (int.from_bytes(bytes(range(8)), "big") ^ (1 << bit)).to_bytes(8, "big")
        assert body_digest(update(data=data)) != body_digest(update())


@pytest.mark.parametrize(
    "array", [{"dtype": "int32"}, {"shape": (1, 2)}, {"shape": (2,)}, {"stype": "raws"}, {"data": bytes(9)}]
)
def test_what_an_array_says_of_its_bytes_counts(array: dict[str, Any]) -> None:
    assert body_digest(update(**array)) != body_digest(update())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ConfigRecord({"a": 1}), ConfigRecord({"a": True})),
        (ConfigRecord({"a": 1}), ConfigRecord({"a": 1.0})),
        (ConfigRecord({"a": 1}), MetricRecord({"a": 1})),
        (ConfigRecord({"a": "x"}), ConfigRecord({"a": b"x"})),
        (ConfigRecord({"a": "x"}), ConfigRecord({"a": ["x"]})),
        (ConfigRecord({"a": "xy", "b": ""}), ConfigRecord({"a": "x", "b": "y"})),
        (ConfigRecord({"ab": "c"}), ConfigRecord({"a": "bc"})),
        (ConfigRecord({"a": 0.0}), ConfigRecord({"a": -0.0})),
        (ConfigRecord(), MetricRecord()),
        (ConfigRecord(), ArrayRecord()),
    ],
)
def test_values_that_look_alike_have_different_hashes(one: Record, other: Record) -> None:
    assert body_digest(RecordDict({"x": one})) != body_digest(RecordDict({"x": other}))


def test_a_records_name_and_its_absence_count() -> None:
    record = ConfigRecord({"a": 1})
    found = {
        body_digest(content)
        for content in (
            RecordDict(),
            RecordDict({"x": record}),
            RecordDict({"y": record}),
            RecordDict({"x": record, "y": record}),
        )
    }
    assert len(found) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("dtype", "stype") for value in (None, 3, ["x"], "\ud800")),
        *(("shape", value) for value in ("x", 3, {}, (2**63,), ("x",), (1.5,), ([1],))),
    ],
)
def test_an_array_that_flower_lets_through_and_nobody_can_read_is_refused(field: str, value: Any) -> None:
    content = update()
    content["arrays"]["w"].__setattr__(field, value)  # as it comes out of a hostile peer's JSON
    assert refused(lambda: body_digest(content)) == "envelope.bad-body"


@given(st.binary(max_size=100))
def test_any_bytes_are_a_record_or_refused_and_nothing_else(data: bytes) -> None:
    for start in (b"", b"fedtune body v1\n", b"fedtune body v1\nA" + bytes(7)):
        if code := code_of(lambda start=start: read_record(start + data)):
            assert code == "envelope.bad-body"


@given(records, st.data())
def test_a_record_cut_short_or_with_a_byte_more_is_refused(record: Record, data: st.DataObject) -> None:
    whole = raw(record)
    assert refused(lambda: read_record(whole + b"\0")) == "envelope.bad-body"
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert refused(lambda: read_record(whole[:cut])) == "envelope.bad-body"


@given(bodies)
def test_a_body_is_its_frame_and_its_arrays(content: RecordDict) -> None:
    arrays = RecordDict({name: record for name, record in content.items() if isinstance(record, ArrayRecord)})
    found = refill(frame(content), arrays)
    assert body_digest(found) == body_digest(content)
    assert all(found[name] is record for name, record in arrays.items())


def test_arrays_are_hashed_where_they_lie_and_once_for_all_sites() -> None:
    size = 32_000_000
    shared = to_record({"w": np.ones(size // 4, np.float32)})
    contents = [RecordDict({"to": ConfigRecord({"site": name}), "arrays": shared}) for name in "abc"]
    digests = Digests()
    tracemalloc.start()
    found = [digests.of(content) for content in contents]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size // 100
    assert found == [body_digest(content) for content in contents]
    assert len(set(found)) == 3
    shared["w"].data = b""
    assert digests.of(contents[0]) == found[0] != body_digest(contents[0])  # not hashed a second time
