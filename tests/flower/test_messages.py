"""Messages say what they mean, or are refused with a code; nothing else ever comes out of decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.errors import DataError, FedtuneError, MessageError
from fedtune.evaluation.metrics import Confusion, Tally
from fedtune.flower.arrays import SERIALISATION, to_record
from fedtune.flower.messages import (
    Description,
    Evaluation,
    Instruction,
    Refusal,
    Update,
    content_bytes,
    decode_description,
    decode_evaluation,
    decode_instruction,
    decode_update,
    encode_instruction,
    encode_reply,
    refusal_of,
    with_receipt,
)
from fedtune.journal.witness import Head, Receipt
from fedtune.privacy.accounting import Event
from tests.support.journals import MemoryJournal

PLAN = "a" * 64
EVENTS = (Event(1.2, 0.1, 30, 1.0), Event(0.7, 1.0, 2, 1.0, noise="secure"))
HEAD = Head.of(MemoryJournal.create("bank-1"))
RECEIPT = Receipt.of(HEAD, Ed25519PrivateKey.generate())
STATE = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.weight": np.ones(1, np.float32)}
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
float32 = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
states = st.dictionaries(names, float32, max_size=4)
events = st.lists(
    st.builds(
        Event,
        st.floats(0, 1e3),
        st.floats(1e-6, 1),
        st.integers(0, 10**6),
        st.floats(1e-3, 1e3),
        noise=st.sampled_from(["seeded", "secure"]),
    ),
    max_size=3,
).map(tuple)


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].tobytes() == right[name].tobytes()
        for name in left
    )


def update(**changes: Any) -> RecordDict:
    return encode_reply(replace(Update(PLAN, "bank-1", 3, STATE, EVENTS, HEAD), **changes))


@given(st.integers(0, 10**6), states, st.sampled_from([None, RECEIPT]))
def test_an_instruction_comes_back_bit_for_bit(number: int, state: dict[str, Any], receipt: Receipt | None) -> None:
    found = decode_instruction(encode_instruction(Instruction(PLAN, number, state, receipt)), PLAN)
    assert (found.plan_sha256, found.round, found.receipt) == (PLAN, number, receipt)
    assert same(found.adapter, state)


def test_instructions_to_two_sites_share_all_but_the_receipt() -> None:
    shared = encode_instruction(Instruction(PLAN, 1, STATE))
    other = Receipt.of(Head.of(MemoryJournal.create("bank-2")), Ed25519PrivateKey.generate())
    first, second = with_receipt(shared, RECEIPT), with_receipt(shared, other)
    assert first["arrays"] is second["arrays"] is shared["arrays"]
    assert first["fedtune"] is second["fedtune"] is shared["fedtune"]
    assert [decode_instruction(content, PLAN).receipt for content in (first, second, shared)] == [RECEIPT, other, None]
    assert with_receipt(shared, None) is shared
    assert 0 < content_bytes(first) - content_bytes(shared) < 1000


@given(names, st.integers(0, 10**6), states, events)
def test_an_update_comes_back_bit_for_bit(site: str, number: int, state: dict[str, Any], spent: Any) -> None:
    found = decode_update(encode_reply(Update(PLAN, site, number, state, spent, HEAD)), PLAN)
    assert isinstance(found, Update)
    assert (found.site, found.round, found.events, found.head) == (site, number, spent, HEAD)
    assert same(found.state, state)


@given(names, st.integers(0, 10**9), events)
def test_a_description_comes_back(site: str, units: int, spent: Any) -> None:
    description = Description(PLAN, site, units, "d" * 64, spent, HEAD)
    assert decode_description(encode_reply(description), PLAN) == description


@pytest.mark.parametrize("name", ["", "a" * 65, "no spaces", "-first", "line\n", "ünïcode"])
def test_a_site_cannot_call_itself_just_anything(name: str) -> None:
    with pytest.raises(MessageError) as caught:
        decode_description(encode_reply(Description(PLAN, name, 10, "d" * 64, (), HEAD)), PLAN)
    assert caught.value.code == "message.wrong-field"


@pytest.mark.parametrize("confusion", [None, Confusion.of([0, 1, 1], [0, 0, 1], 2)])
def test_an_evaluation_comes_back(confusion: Confusion | None) -> None:
    arrays = Tally(1.5, 3, 0, confusion).to_arrays()
    found = decode_evaluation(encode_reply(Evaluation(PLAN, "bank-1", 2, arrays, HEAD)), PLAN)
    assert isinstance(found, Evaluation)
    assert (found.site, found.round, found.head) == ("bank-1", 2, HEAD)
    assert same(found.tally, arrays)


@pytest.mark.parametrize("decode", [decode_description, decode_update, decode_evaluation])
def test_a_refusal_is_understood_whatever_was_asked(decode: Any) -> None:
    assert decode(encode_reply(Refusal("data.missing-column")), PLAN) == Refusal("data.missing-column")


def test_a_refusal_is_a_code_and_never_the_text_of_the_error() -> None:
    secret = "patient 4711"
    for error in (DataError("bad-row", secret, hint=secret), ValueError(secret), KeyError(secret)):
        content = encode_reply(refusal_of(error))
        assert secret not in repr(content)
    assert refusal_of(DataError("bad-row", secret)).code == "data.bad-row"
    assert refusal_of(ValueError(secret)).code == "site.internal"


def test_the_code_of_a_refusal_is_cut() -> None:
    found = decode_update(encode_reply(Refusal("x" * 10_000)), PLAN)
    assert found == Refusal("x" * 64)


def test_equal_content_has_equal_bytes_in_whatever_order_it_was_made() -> None:
    backwards = {name: STATE[name] for name in reversed(list(STATE))}
    first, second = (encode_instruction(Instruction(PLAN, 1, state)) for state in (STATE, backwards))
    assert first.object_id == second.object_id
    assert list(first["arrays"]) == sorted(STATE)


def test_content_bytes_count_what_the_arrays_and_the_header_hold() -> None:
    small, large = (content_bytes(update(state={"x": np.zeros(size, np.float32)})) for size in (10, 1010))
    assert large - small == 4000
    assert content_bytes(RecordDict()) == 0
    assert content_bytes(RecordDict({"other": MetricRecord({"x": 1.0})})) > 0


def changed(content: RecordDict, **fields: Any) -> RecordDict:
    """Replace header fields; None removes one."""
    header = {**dict(content["fedtune"]), **fields}
    kept = ConfigRecord({key: value for key, value in header.items() if value is not None})
    return RecordDict({**dict(content), "fedtune": kept})


def with_array(name: str = "x", **fields: Any) -> RecordDict:
    """Put one array into an update whose fields are not what they seem."""
    honest = {"dtype": "float32", "shape": (2,), "stype": SERIALISATION, "data": bytes(8)}
    return RecordDict({**dict(update()), "arrays": ArrayRecord({name: Array(**{**honest, **fields})})})


def head_with(**fields: Any) -> str:
    return json.dumps({**HEAD.to_dict(), **fields})


def head_without(name: str) -> str:
    return json.dumps({key: value for key, value in HEAD.to_dict().items() if key != name})


BROKEN = {
    "another schema": (lambda: changed(update(), schema=3), "message.wrong-schema"),
    "a schema of another type": (lambda: changed(update(), schema="1"), "message.wrong-schema"),
    "no schema": (lambda: changed(update(), schema=None), "message.wrong-schema"),
    "no header": (lambda: RecordDict({"arrays": to_record(STATE)}), "message.wrong-schema"),
    "arrays as header": (lambda: RecordDict({"fedtune": to_record(STATE)}), "message.wrong-schema"),
    "nothing": (RecordDict, "message.wrong-schema"),
    "another kind": (lambda: encode_instruction(Instruction(PLAN, 1, STATE)), "message.wrong-kind"),
    "no kind": (lambda: changed(update(), kind=None), "message.wrong-field"),
    "another plan": (lambda: update(plan_sha256="b" * 64), "message.other-plan"),
    "no plan": (lambda: changed(update(), plan_sha256=None), "message.wrong-field"),
    "no site": (lambda: changed(update(), site=None), "message.wrong-field"),
    "a site that is a number": (lambda: changed(update(), site=7), "message.wrong-field"),
    "a site of a million letters": (lambda: changed(update(), site="x" * 1_000_001), "message.wrong-field"),
    "no round": (lambda: changed(update(), round=None), "message.wrong-field"),
    "a round that is a text": (lambda: changed(update(), round="3"), "message.wrong-field"),
    "a round that is true": (lambda: changed(update(), round=True), "message.wrong-field"),
    "a round that is a list": (lambda: changed(update(), round=[3]), "message.wrong-field"),
    "no events": (lambda: changed(update(), events=None), "message.wrong-field"),
    "events that are no JSON": (lambda: changed(update(), events="["), "message.wrong-events"),
    "events that are no list": (lambda: changed(update(), events="3"), "message.wrong-events"),
    "events of texts": (lambda: changed(update(), events='["x"]'), "privacy.event"),
    "events that nest": (lambda: changed(update(), events="[" * 900_000), "message.wrong-events"),
    "an event with a text for a number": (
        lambda: changed(update(), events=json.dumps([{**EVENTS[0].to_dict(), "noise_multiplier": "x"}])),
        "privacy.event",
    ),
    "an event with a field more": (
        lambda: changed(update(), events=json.dumps([{**EVENTS[0].to_dict(), "also": 1}])),
        "privacy.event",
    ),
    "an event with negative steps": (
        lambda: changed(update(), events=json.dumps([{**EVENTS[0].to_dict(), "steps": -1}])),
        "privacy.event",
    ),
    "no head": (lambda: changed(update(), head=None), "message.wrong-field"),
    "a head that is no JSON": (lambda: changed(update(), head="{"), "message.wrong-head"),
    "a head that is no object": (lambda: changed(update(), head="[]"), "message.wrong-head"),
    "a head that nests": (lambda: changed(update(), head="[" * 900_000), "message.wrong-head"),
    "a head without a digest": (lambda: changed(update(), head=head_without("digest")), "message.wrong-head"),
    "a head before the first record": (lambda: changed(update(), head=head_with(sequence=-1)), "message.wrong-head"),
    "a head with a short hash": (lambda: changed(update(), head=head_with(site="a" * 63)), "message.wrong-head"),
    "a head with a long signature": (
        lambda: changed(update(), head=head_with(signature="a" * 129)),
        "message.wrong-head",
    ),
    "a receipt where a site sends none": (
        lambda: RecordDict({**dict(update()), "receipt": with_receipt(RecordDict(), RECEIPT)["receipt"]}),
        "message.wrong-records",
    ),
    "no arrays": (lambda: RecordDict({"fedtune": update()["fedtune"]}), "message.wrong-records"),
    "a record more": (lambda: RecordDict({**dict(update()), "also": ConfigRecord()}), "message.wrong-records"),
    "a header as arrays": (lambda: RecordDict({**dict(update()), "arrays": ConfigRecord()}), "message.wrong-records"),
    "float64": (lambda: update(state={"x": np.zeros(2, np.float64)}), "message.wrong-dtype"),
    "an unknown type": (lambda: with_array(dtype="object"), "message.wrong-dtype"),
    "NumPy's own format": (lambda: with_array(stype="numpy.ndarray"), "message.wrong-dtype"),
    "too few bytes": (lambda: with_array(data=bytes(7)), "message.wrong-shape"),
    "too many bytes": (lambda: with_array(data=bytes(9)), "message.wrong-shape"),
    "a huge shape": (lambda: with_array(shape=(2**40, 2**40)), "message.wrong-shape"),
    "a negative shape": (lambda: with_array(shape=(-1, -2)), "message.wrong-shape"),
    "an empty huge shape": (lambda: with_array(shape=(0, 2**70), data=b""), "message.wrong-shape"),
    "a hundred dimensions": (lambda: with_array(shape=(1,) * 100, data=bytes(4)), "message.wrong-shape"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_malformed_update_is_refused_with_its_code(kind: str) -> None:
    make, code = BROKEN[kind]
    with pytest.raises(FedtuneError) as caught:
        decode_update(make(), PLAN)
    assert caught.value.code == code


def test_a_well_formed_update_is_not() -> None:
    assert isinstance(decode_update(update(), PLAN), Update)
    assert isinstance(decode_update(with_array(), PLAN), Update)


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (ConfigRecord({}), "message.wrong-records"),
        (ConfigRecord({"receipt": "{}", "also": "x"}), "message.wrong-records"),
        (to_record({}), "message.wrong-records"),
        (ConfigRecord({"receipt": 1}), "message.wrong-field"),
        (ConfigRecord({"receipt": "{}"}), "message.wrong-head"),
        (ConfigRecord({"receipt": "nonsense"}), "message.wrong-head"),
        (ConfigRecord({"receipt": json.dumps({**RECEIPT.to_dict(), "head": {}})}), "message.wrong-head"),
        (ConfigRecord({"receipt": json.dumps({**RECEIPT.to_dict(), "witness": "f"})}), "message.wrong-head"),
    ],
)
def test_an_instruction_with_anything_but_a_receipt_is_refused(record: Any, code: str) -> None:
    content = RecordDict({**encode_instruction(Instruction(PLAN, 1, STATE)), "receipt": record})
    with pytest.raises(MessageError) as caught:
        decode_instruction(content, PLAN)
    assert caught.value.code == code


scalars = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8), st.booleans(), st.binary(max_size=8)
)


def code_of(decode: Any, content: RecordDict) -> str:
    """Return the code with which content is refused, or an empty string; any other exception comes through."""
    try:
        decode(content, PLAN)
    except FedtuneError as error:
        return error.code
    return ""


@given(
    st.dictionaries(
        st.sampled_from(["schema", "kind", "plan_sha256", "site", "round", "events", "head", "code"]), scalars
    )
)
def test_any_header_decodes_or_is_refused_and_nothing_else(fields: dict[str, Any]) -> None:
    for decode in (decode_update, decode_description, decode_evaluation, decode_instruction):
        assert code_of(decode, changed(update(), **fields)).partition(".")[0] in {"", "message", "privacy"}


@given(
    st.sampled_from(["float32", "float64", "int64", "int8", ""]),
    st.lists(st.integers(-(2**70), 2**70) | st.integers(0, 3), max_size=5).map(tuple),
    st.binary(max_size=64),
)
def test_any_array_decodes_or_is_refused_and_nothing_else(dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    code = code_of(decode_update, with_array(dtype=dtype, shape=shape, data=data))
    assert code in {"", "message.wrong-dtype", "message.wrong-shape"}
