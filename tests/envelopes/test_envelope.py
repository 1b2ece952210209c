"""What is signed is the whole header, in one spelling; a bit elsewhere, or a message for elsewhere, is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from fedtune.envelopes.envelope import (
    CONTEXT,
    LIFETIME,
    SKEW,
    Envelope,
    Expected,
    Header,
    check_time,
    read_header,
    verify,
)
from fedtune.envelopes.peers import Peers
from fedtune.errors import EnvelopeError
from fedtune.journal.chain import public_hex
from tests.support.parties import BODY, COORDINATOR, FEDERATION, NOON, OTHER_STUDY, STUDY, Federation, code_of, refused

FED = Federation()
for party in (COORDINATOR, "bank-1", "bank-2"):
    FED.join(party)
PEERS = Peers(lambda: FED.known)
GOOD = Envelope.sign(FED.header(), FED.keys[COORDINATOR])
WANTED = Expected(FEDERATION, STUDY, COORDINATOR, "bank-1", "request", "train", 1, "")

hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
numbers = st.integers(0, 10**15 - 1)
headers = st.builds(
    Header,
    federation=names,
    study=hashes,
    round=numbers,
    sender=names,
    receiver=names,
    sequence=numbers,
    direction=st.sampled_from(["request", "answer"]),
    kind=st.from_regex(r"[a-z][a-z0-9-]{0,31}", fullmatch=True),
    issued=numbers,
    expires=numbers,
    reply_to=hashes | st.just(""),
    body=hashes,
    key=hashes,
)
ELSE: dict[str, Any] = {
    "federation": "hospitals",
    "study": OTHER_STUDY,
    "round": 2,
    "sender": "bank-2",
    "receiver": "bank-2",
    "sequence": NOON + 1,
    "direction": "answer",
    "kind": "evaluate",
    "issued": NOON + 1,
    "expires": NOON + 60_001,
    "reply_to": "d" * 64,
    "body": "e" * 64,
    "key": public_hex(FED.keys["bank-1"]),
}


@given(headers)
def test_a_header_is_canonical_json_and_comes_back(header: Header) -> None:
    raw = header.to_bytes()
    assert raw == rfc8785.dumps(asdict(header))
    assert read_header(raw) == header
    assert len(raw) <= 1_100


@given(headers, st.data())
def test_no_other_spelling_of_a_header_is_read(header: Header, data: st.DataObject) -> None:
    value = asdict(header)
    order = data.draw(st.permutations(sorted(value)))
    spellings = [
        json.dumps(value, sort_keys=True).encode(),
        header.to_bytes() + b"\n",
        header.to_bytes() + header.to_bytes(),
        header.to_bytes().replace(b'"round":', b'"round":0'),
        json.dumps({name: value[name] for name in order}, separators=(",", ":")).encode(),
    ]
    for raw in spellings:
        assert raw == header.to_bytes() or refused(lambda raw=raw: read_header(raw)) == "envelope.bad-header"


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_header_or_refused_and_nothing_else(raw: bytes) -> None:
    assert code_of(lambda: read_header(raw)) == "envelope.bad-header"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation", 'x","study":"'),
        ("sender", "bänk"),
        ("sender", ""),
        ("sender", "a/b"),
        ("sender", "a" * 65),
        ("kind", "Train"),
        ("round", -1),
        ("round", 10**15),
        ("round", True),
        ("sequence", 1.0),
        ("study", "A" * 64),
        ("body", "a" * 63),
        ("reply_to", "a"),
        ("direction", "both"),
        ("key", "a" * 64 + "\n"),
    ],
)
def test_a_header_that_could_be_read_otherwise_is_not_signed(field: str, value: object) -> None:
    header = replace(FED.header(), **{field: value})  # type: ignore[arg-type]
    assert refused(header.to_bytes) == "envelope.bad-header"


def test_a_good_message_is_taken() -> None:
    header, generation = verify(GOOD, PEERS)
    WANTED.check(header)
    check_time(header, NOON)
    assert (header, generation) == (FED.header(), 0)


@given(st.integers(0, 8 * len(GOOD.raw) - 1))
def test_every_bit_of_the_header_is_signed(bit: int) -> None:
    assert refused(lambda: verify(Envelope(flipped(GOOD.raw, bit), GOOD.signature), PEERS)) in {
        "envelope.bad-header",
        "envelope.unknown-sender",
        "envelope.unknown-key",
        "envelope.forged",
    }


def test_every_bit_of_the_signature_counts() -> None:
    for bit in range(8 * len(GOOD.signature)):
        forged = Envelope(GOOD.raw, flipped(GOOD.signature, bit))
        assert refused(lambda forged=forged: verify(forged, PEERS)) == "envelope.forged"


@pytest.mark.parametrize("signature", [b"", bytes(64), GOOD.signature + b"\0", GOOD.signature[:-1]], ids=len)
def test_a_signature_of_another_length_is_none(signature: bytes) -> None:
    assert refused(lambda: verify(Envelope(GOOD.raw, signature), PEERS)) == "envelope.forged"


@pytest.mark.parametrize("field", [field.name for field in fields(Header)])
def test_every_field_changed_after_signing_is_refused(field: str) -> None:
    changed = replace(FED.header(), **{field: ELSE[field]})
    assert changed != FED.header()
    assert refused(lambda: verify(Envelope(changed.to_bytes(), GOOD.signature), PEERS)) in {
        "envelope.forged",
        "envelope.unknown-key",
    }


@pytest.mark.parametrize("name", ["federation", "study", "sender", "receiver", "direction", "kind", "round"])
def test_what_was_honestly_signed_for_elsewhere_is_not_taken_here(name: str) -> None:
    sender = ELSE["sender"] if name == "sender" else COORDINATOR
    elsewhere = Envelope.sign(
        replace(FED.header(), **{name: ELSE[name], "key": public_hex(FED.keys[sender])}), FED.keys[sender]
    )
    header, _ = verify(elsewhere, PEERS)  # the signature is good: the control
    assert refused(lambda: WANTED.check(header)) == f"envelope.other-{name}"
    replace(WANTED, **{name: ELSE[name], "reply_to": None}).check(
        replace(header, reply_to="d" * 64 if name == "direction" else "")
    )


def test_an_answer_without_its_request_and_a_request_with_one_are_refused() -> None:
    either = replace(WANTED, reply_to=None)
    assert refused(lambda: either.check(FED.header(reply_to="d" * 64))) == "envelope.other-reply-to"
    assert refused(lambda: replace(either, direction="answer").check(FED.header(direction="answer"))) == (
        "envelope.other-reply-to"
    )


def test_a_peer_cannot_sign_in_another_peers_name() -> None:
    for key in ("bank-2", "bank-1"):
        header = FED.header(key=public_hex(FED.keys[key]))
        assert refused(lambda header=header, key=key: verify(Envelope.sign(header, FED.keys[key]), PEERS)) == (
            "envelope.unknown-key"
        )
    with pytest.raises(ValueError, match="another key"):
        Envelope.sign(FED.header(), FED.keys["bank-2"])


def test_a_signature_of_the_same_key_for_another_purpose_is_none() -> None:
    key, raw = FED.keys[COORDINATOR], GOOD.raw
    assert verify(Envelope(raw, key.sign(CONTEXT + raw)), PEERS)
    for context in (b"", b"fedtune journal v1\n", b"fedtune envelope v2\n"):
        assert refused(lambda context=context: verify(Envelope(raw, key.sign(context + raw)), PEERS)) == (
            "envelope.forged"
        )


@pytest.mark.parametrize(
    ("issued", "expires", "code"),
    [
        (0, 60_000, ""),
        (SKEW, SKEW, ""),
        (SKEW + 1, SKEW + 2, "envelope.not-yet"),
        (-200_000, -SKEW, ""),
        (-200_000, -SKEW - 1, "envelope.expired"),
        (0, -1, "envelope.long-lived"),
        (0, LIFETIME, ""),
        (0, LIFETIME + 1, "envelope.long-lived"),
    ],
)
def test_clocks_may_be_two_minutes_apart_and_no_more(issued: int, expires: int, code: str) -> None:
    header = FED.header(issued=NOON + issued, expires=NOON + expires)
    assert code_of(lambda: check_time(header, NOON)) == code


def test_a_digest_is_that_of_the_header_alone() -> None:
    assert (
        GOOD.digest
        == Envelope(GOOD.raw, b"").digest
        != Envelope.sign(FED.header(round=2), FED.keys[COORDINATOR]).digest
    )
    assert BODY in GOOD.raw.decode()


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_errors_name_what_to_do() -> None:
    with pytest.raises(EnvelopeError) as caught:
        check_time(FED.header(), NOON + 10**6)
    assert caught.value.hint
