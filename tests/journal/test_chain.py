from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import assume, given
from hypothesis import strategies as st

from fedtune.errors import JournalError
from fedtune.journal import entries as e
from fedtune.journal.canonical import read_canonical
from fedtune.journal.chain import Chain, moment, public_hex
from fedtune.journal.entries import KINDS, read_entry
from tests.support.site_journals import EVENT, Site, chain_of, charge, data, forge, twelve

KEY = Ed25519PrivateKey.from_private_bytes(b"\2" * 32)
CREATED = e.SiteCreated(site="hospital", public_key=public_hex(KEY))
TIME = "2026-01-01T00:00:00.000000Z"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def signed(body: bytes, key: Ed25519PrivateKey = KEY) -> bytes:
    signature = key.sign(b"fedtune journal v1\n" + body).hex()
    return b'{"body":' + body + b',"signature":"' + signature.encode() + b'"}'


def refused(line: bytes, chain: Chain | None = None) -> str:
    with pytest.raises(JournalError) as error:
        (chain or Chain()).accept(line)
    return error.value.code


def first_line() -> bytes:
    return Chain().extend(CREATED, TIME, KEY)


def test_a_record_is_checked_by_ten_lines_that_share_no_code_with_ours(site: Site) -> None:
    """The format is public: this is how an auditor would read it."""
    import hashlib

    previous = "0" * 64
    for number, line in enumerate(twelve(site)):
        record = json.loads(line)
        body = record["body"]
        assert (body["sequence"], body["previous"]) == (number, previous)
        if number == 0:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(body["entry"]["public_key"]))
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
        assert line.startswith(b'{"body":' + canonical)
        key.verify(bytes.fromhex(record["signature"]), b"fedtune journal v1\n" + canonical)
        previous = hashlib.sha256(line).hexdigest()


def test_a_line_says_what_was_put_in_and_moves_the_chain_on() -> None:
    chain, record = Chain().accept(first_line())
    assert (record.sequence, record.time, record.entry) == (0, TIME, CREATED)
    assert (chain.length, chain.site, chain.public_key) == (1, record.digest, public_hex(KEY))


def test_nothing_but_the_site_s_creation_begins_a_journal_and_nothing_creates_it_again() -> None:
    assert refused(Chain().extend(data("claims"), TIME, KEY), Chain(public_key=public_hex(KEY))) == "journal.tampered"
    chain, _ = Chain().accept(first_line())
    assert refused(chain.extend(CREATED, TIME, KEY), chain) == "journal.tampered"


def test_a_key_that_is_asked_for_has_to_be_the_one_that_signs_and_is_named() -> None:
    other = Ed25519PrivateKey.generate()
    asked = Chain(public_key=public_hex(other))
    assert refused(first_line(), asked) == "journal.tampered"
    assert refused(Chain().extend(CREATED, TIME, other), asked) == "journal.tampered"
    Chain(public_key=public_hex(KEY)).accept(first_line())


def test_the_same_record_in_another_spelling_is_refused_though_its_signature_is_right() -> None:
    body = json.loads(first_line())["body"]
    spellings = [
        json.dumps(body),  # spaces
        json.dumps({key: body[key] for key in sorted(body, reverse=True)}, separators=(",", ":")),
        rfc8785.dumps(body).decode().replace('"sequence":0', '"sequence":0.0'),
        rfc8785.dumps(body).decode().replace('"sequence":0', '"sequence":-0'),
        rfc8785.dumps(body).decode().replace("hospital", r"\u0068ospital"),
        rfc8785.dumps(body).decode().replace('"sequence":0', '"sequence":0,"sequence":0'),
        rfc8785.dumps(body).decode().replace('"sequence":0', '"sequence":NaN'),
        rfc8785.dumps(body).decode().replace('"sequence":0', f'"sequence":{"[" * 100_000}'),
        rfc8785.dumps([body]).decode(),
        "0",
        "",
    ]
    for spelling in spellings:
        assert refused(signed(spelling.encode())) == "journal.tampered", spelling[:80]
    assert refused(first_line() + b"\r") == "journal.tampered"
    assert refused(first_line().replace(b'"signature":"', b'"signature":"+')) == "journal.tampered"
    Chain().accept(signed(rfc8785.dumps(body)))  # the control


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": 1},
        {"sequence": False},
        {"previous": "1" * 64},
        {"time": "2026-01-01T00:00:00Z"},
        {"time": "2026-13-01T00:00:00.000000Z"},
        {"time": 5},
        {"more": 1},
    ],
)
def test_a_field_that_no_record_has_is_refused_though_it_is_signed(change: dict[str, Any]) -> None:
    body = json.loads(first_line())["body"]
    assert refused(signed(rfc8785.dumps({**body, **change}))) == "journal.tampered"


def test_what_a_site_has_signed_and_this_version_cannot_read_is_not_called_tampered(site: Site) -> None:
    lines = twelve(site)
    body = json.loads(forge(lines, [data("more")], site.key)[-1])["body"]
    event = {**EVENT.to_dict()}
    reserve = {**json.loads(lines[5])["body"]["entry"]}
    unknown = [
        {**body, "kind": "from-the-future"},
        {**body, "entry": {}},
        {**body, "entry": []},
        {**body, "kind": "reserve", "entry": {**reserve, "event": {**event, "unit": []}}},
        {**body, "kind": "reserve", "entry": {**reserve, "event": {**event, "noise_multiplier": -1}}},
        {**body, "kind": "reserve", "entry": {**reserve, "event": {**event, "more": 1}}},
        {**body, "kind": "reserve", "entry": {**reserve, "event": {**event, "sampler": "shuffle", "steps": 1}}},
    ]
    for record in unknown:
        assert refused(signed(rfc8785.dumps(record), site.key), chain_of(lines)) == "journal.unknown-entry", record


def test_time_goes_back_only_where_a_person_has_confirmed_the_clock() -> None:
    chain, _ = Chain().accept(first_line())
    earlier = "2025-01-01T00:00:00.000000Z"
    assert refused(chain.extend(data("claims"), earlier, KEY), chain) == "journal.tampered"
    chain, _ = chain.accept(chain.extend(e.ClockSet(before=TIME), earlier, KEY))
    chain.accept(chain.extend(data("claims"), earlier, KEY))


def test_a_moment_sorts_as_text_whatever_the_time_zone() -> None:
    times = [datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=hours))) for hours in range(-12, 13)]
    assert sorted(times) == sorted(times, key=moment)
    assert moment(datetime(2026, 11, 22, 4, 5, 6, 7, tzinfo=UTC)) == "2026-11-22T04:05:06.000007Z"


def test_floats_survive_json_which_has_one_kind_of_number() -> None:
    for sigma, rate in [(1.0, 1.0), (1e-7, 1e-7), (1e16, 0.1), (1e300, 0.3), (123456789.125, 1 / 3)]:
        event = charge(1).event
        assert event is not None
        fields = {**event.to_dict(), "noise_multiplier": sigma, "sampling_rate": rate}
        entry = e.Reserved(plan="a" * 64, round=1, purpose="training", input="b" * 64, data=1, grant=2, event=fields)
        chain, _ = Chain().accept(first_line())
        _, record = chain.accept(chain.extend(entry, TIME, KEY))
        assert isinstance(record.entry, e.Reserved)
        read = record.entry.mechanism()
        assert read is not None
        assert (read.noise_multiplier, read.sampling_rate) == (sigma, rate)
        assert all(isinstance(value, float) for value in (read.noise_multiplier, read.sampling_rate, read.clip_norm))


def test_every_kind_of_entry_is_registered_under_the_name_that_it_writes() -> None:
    assert set(KINDS.values()) == set(e.Entry.__subclasses__())
    assert all(model.kind == kind for kind, model in KINDS.items())


def test_no_entry_takes_a_field_that_it_does_not_have() -> None:
    for kind, model in KINDS.items():
        with pytest.raises(JournalError):
            read_entry(kind, {**dict.fromkeys(model.model_fields, "a" * 64), "text": "a patient's record"})


@given(VALUES)
def test_canonical_json_is_read_and_every_other_spelling_of_it_is_refused(value: Any) -> None:
    canonical = written(value)
    assume(canonical is not None)
    assert canonical is not None
    read = read_canonical(canonical)
    assert rfc8785.dumps(read) == canonical
    for other in (json.dumps(value), json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)):
        assert reads(other) == (other.encode() == canonical)


@given(st.text(alphabet='{}[]",:0123456789.eE+-atrufnl\\ u', max_size=12))
def test_text_is_read_exactly_when_the_reference_would_write_it(text: str) -> None:
    try:
        expected = written(json.loads(text)) == text.encode()
    except (ValueError, RecursionError):
        expected = False
    assert reads(text) == expected


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("9007199254740991", True),
        ("9007199254740993", False),  # no double has this value
        ("10000000000000000", True),  # how 1e16 is written
        ("1e16", False),
        ("1e+21", True),
        ("0.000001", True),
        ("1e-7", True),
        ("1e-07", False),
        ("-0", False),
        ("0.0", False),
        ("Infinity", False),
        ('"\\u001f"', True),
        ('"\\u001F"', False),
        ('"\\/"', False),
        ('"\\ud800"', False),
        ('"é"', True),
        ('{"\ufb33":1,"\U0001f600":2}', False),  # RFC 8785 sorts by UTF-16 code units
        ('{"\U0001f600":2,"\ufb33":1}', True),
    ],
)
def test_the_corners_of_rfc_8785_are_read_as_it_says(text: str, canonical: bool) -> None:
    assert reads(text) == canonical


def written(value: Any) -> bytes | None:
    try:
        return rfc8785.dumps(value)
    except ValueError:
        return None


def reads(text: str) -> bool:
    try:
        read_canonical(text.encode())
    except ValueError:
        return False
    return True
