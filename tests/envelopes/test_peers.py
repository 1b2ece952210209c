"""Who may sign is asked at each message; both keys replace one by the other, and a revoked key is never good again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.envelopes.envelope import Envelope, verify
from fedtune.envelopes.peers import Known, PeerFile, PeerKey, Peers, Rotation, enrolled, revoked, rotated
from fedtune.journal.chain import public_hex
from tests.support.parties import COORDINATOR, FEDERATION, NOON, Federation, new_key, refused

KEY = "1" * 64


@pytest.fixture
def fed() -> Federation:
    fed = Federation()
    fed.join(COORDINATOR)
    fed.join("bank-1")
    return fed


def signed(fed: Federation, **changes: Any) -> Envelope:
    return Envelope.sign(fed.header("bank-1", direction="answer", reply_to="d" * 64, **changes), fed.keys["bank-1"])


def rotate(fed: Federation, at: int = NOON) -> Rotation:
    """Give bank-1 a new key, and return what it says of it."""
    old, fed.keys["bank-1"] = fed.keys["bank-1"], new_key()
    return Rotation.sign(FEDERATION, "bank-1", (old, fed.keys["bank-1"]), at)


def test_a_revocation_holds_at_the_next_message(fed: Federation) -> None:
    peers, message = Peers(lambda: fed.known), signed(fed)
    assert verify(message, peers)
    fed.known = revoked(fed.known, "bank-1")
    assert refused(lambda: verify(message, peers)) == "envelope.revoked"
    assert not peers.is_active("bank-1")
    assert peers.is_active(COORDINATOR)


def test_nobody_is_known_who_is_not_enrolled(fed: Federation) -> None:
    message = signed(fed)
    fed.known = {COORDINATOR: fed.known[COORDINATOR]}
    assert refused(lambda: verify(message, Peers(lambda: fed.known))) == "envelope.unknown-sender"
    assert refused(lambda: revoked(fed.known, "bank-1")) == "envelope.unknown-sender"


def test_after_a_rotation_the_old_key_is_good_for_what_it_had_signed(fed: Federation) -> None:
    peers = Peers(lambda: fed.known)
    before, later = signed(fed, issued=NOON), signed(fed, issued=NOON + 1, expires=NOON + 2)
    rotation = rotate(fed)
    assert refused(lambda: verify(signed(fed), peers)) == "envelope.unknown-key"
    fed.known = rotated(fed.known, rotation, FEDERATION, NOON)
    assert verify(before, peers)[1] == 0
    assert verify(signed(fed), peers)[1] == 1
    assert refused(lambda: verify(later, peers)) == "envelope.retired-key"
    assert verify(later, Peers(lambda: {"bank-1": (PeerKey(later.header.key),)}))  # the control: without the rotation


def test_a_rotation_takes_effect_no_later_than_now(fed: Federation) -> None:
    found = rotated(fed.known, rotate(fed, at=NOON + 10**9), FEDERATION, NOON)
    assert found["bank-1"][0].until == NOON


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation", "hospitals"),
        ("name", COORDINATOR),
        ("old", KEY),
        ("new", KEY),
        ("at", NOON + 1),
        ("old_signature", "00" * 64),
        ("new_signature", "00" * 64),
        ("new_signature", "nonsense"),
    ],
)
def test_a_rotation_that_both_keys_did_not_sign_is_refused(fed: Federation, field: str, value: object) -> None:
    changed: Rotation = replace(rotate(fed), **{field: value})  # type: ignore[arg-type]
    assert refused(lambda: rotated(fed.known, changed, FEDERATION, NOON)) == "envelope.forged"


def test_a_rotation_is_for_its_federation_and_for_the_key_in_force(fed: Federation) -> None:
    rotation = rotate(fed)
    assert refused(lambda: rotated(fed.known, rotation, "hospitals", NOON)) == "envelope.other-federation"
    done = rotated(fed.known, rotation, FEDERATION, NOON)
    assert refused(lambda: rotated(done, rotation, FEDERATION, NOON)) == "envelope.unknown-key"
    assert refused(lambda: rotated(revoked(fed.known, "bank-1"), rotation, FEDERATION, NOON)) == "envelope.unknown-key"
    assert refused(lambda: rotated({}, rotation, FEDERATION, NOON)) == "envelope.unknown-key"


def test_a_revoked_peer_comes_back_with_a_new_key_only(fed: Federation) -> None:
    old = fed.known["bank-1"][0].key
    assert refused(lambda: enrolled(fed.known, "bank-1", KEY)) == "envelope.already-enrolled"
    gone = revoked(fed.known, "bank-1")
    assert refused(lambda: enrolled(gone, "bank-1", old)) == "envelope.key-taken"
    back = Peers(lambda: enrolled(gone, "bank-1", KEY))
    assert back.standing("bank-1", KEY).generation == 1
    assert refused(lambda: back.standing("bank-1", old)) == "envelope.revoked"


def test_two_peers_never_have_one_key(fed: Federation) -> None:
    assert refused(lambda: enrolled(fed.known, "bank-2", fed.known["bank-1"][0].key)) == "envelope.key-taken"
    keys = (fed.keys["bank-1"], fed.keys[COORDINATOR])
    rotation = Rotation.sign(FEDERATION, "bank-1", keys, NOON)
    assert refused(lambda: rotated(fed.known, rotation, FEDERATION, NOON)) == "envelope.key-taken"


keys = st.builds(
    PeerKey, st.text("0123456789abcdef", min_size=64, max_size=64), st.none() | st.integers(0, 10**14), st.booleans()
)


@given(st.dictionaries(st.sampled_from([COORDINATOR, "bank-1", "b.2"]), st.lists(keys, max_size=3).map(tuple)))
def test_a_file_says_what_was_written(tmp_path_factory: pytest.TempPathFactory, known: Known) -> None:
    file = PeerFile(tmp_path_factory.mktemp("peers") / "peers.json")
    file.write(known)
    assert dict(PeerFile(file.path)()) == known == dict(file())


def test_a_file_is_read_again_at_each_message(fed: Federation, tmp_path: Path) -> None:
    file, message = PeerFile(tmp_path / "peers.json"), signed(fed)
    file.write(fed.known)
    peers = Peers(file)
    assert verify(message, peers)
    PeerFile(file.path).write(revoked(fed.known, "bank-1"))  # another process
    assert refused(lambda: verify(message, peers)) == "envelope.revoked"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"peers":{},"version":2}',
        '{"peers":{},"version":1,"also":1}',
        '{"peers":{"a b":[]},"version":1}',
        '{"peers":{"a":[{"key":"1"}]},"version":1}',
        f'{{"peers":{{"a":[{{"key":"{KEY}","revoked":"no"}}]}},"version":1}}',
        f'{{"peers":{{"a":[{{"key":"{KEY}","until":"5"}}]}},"version":1}}',
        None,
    ],
)
def test_without_a_readable_file_nobody_may_sign(fed: Federation, tmp_path: Path, text: str | None) -> None:
    file, message = PeerFile(tmp_path / "peers.json"), signed(fed)
    file.write(fed.known)
    assert file()
    file.path.unlink() if text is None else file.path.write_text(text)
    assert refused(lambda: verify(message, Peers(file))) == "envelope.no-peers"


def test_a_key_is_known_by_all_its_digits(fed: Federation) -> None:
    assert Peers(lambda: fed.known).standing("bank-1", public_hex(fed.keys["bank-1"])).until is None
    assert refused(lambda: Peers(lambda: fed.known).standing("bank-1", KEY)) == "envelope.unknown-key"
