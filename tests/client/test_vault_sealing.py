"""Sealed bytes: what was sealed comes back, and nothing else ever does."""

from __future__ import annotations

import hashlib
import secrets
import unicodedata

import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import VaultError
from fedtune_client.vault import sealing
from fedtune_client.vault.sealing import context, key_from_key, key_from_passphrase, new_key, seal, unseal

KEY = bytes(range(32))
keys = st.binary(min_size=32, max_size=32)


@given(key=keys, data=st.binary(max_size=300), bound_to=st.binary(max_size=40))
def test_what_is_sealed_comes_back(key: bytes, data: bytes, bound_to: bytes) -> None:
    sealed = seal(key, data, bound_to)
    assert unseal(key, sealed, bound_to) == data
    assert len(sealed) == len(data) + 28


@given(data=st.binary(max_size=100), at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_wherever_it_is(data: bytes, at: int, bit: int) -> None:
    sealed = bytearray(seal(KEY, data, b"here"))
    sealed[at % len(sealed)] ^= 1 << bit
    with pytest.raises(InvalidTag):
        unseal(KEY, bytes(sealed), b"here")


@given(data=st.binary(max_size=100), length=st.integers(min_value=0), more=st.binary(min_size=1, max_size=20))
def test_a_shorter_or_longer_text_is_refused(data: bytes, length: int, more: bytes) -> None:
    sealed = seal(KEY, data, b"here")
    for wrong in (sealed[: length % len(sealed)], sealed + more, more + sealed):
        with pytest.raises(InvalidTag):
            unseal(KEY, wrong, b"here")


@given(one=keys, other=keys, here=st.binary(max_size=9), there=st.binary(max_size=9))
def test_another_key_or_another_place_is_refused(one: bytes, other: bytes, here: bytes, there: bytes) -> None:
    sealed = seal(one, b"data", here)
    for key, place in ((one, there), (other, here), (other, there)):
        if (key, place) != (one, here):
            with pytest.raises(InvalidTag):
                unseal(key, sealed, place)


names = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\n"), max_size=8)


@given(one=st.lists(names, min_size=1, max_size=4), other=st.lists(names, min_size=1, max_size=4))
def test_different_parts_never_join_to_the_same_context(one: list[str], other: list[str]) -> None:
    assert (context(*one) == context(*other)) == (one == other)


def test_no_nonce_comes_twice_and_equal_data_never_looks_equal() -> None:
    sealed = [seal(KEY, b"the same", b"") for _ in range(20_000)]
    assert len({text[:12] for text in sealed}) == len({text[12:] for text in sealed}) == 20_000


def test_new_keys_are_new() -> None:
    assert len({new_key() for _ in range(1000)}) == 1000


def test_an_item_that_the_cipher_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MOST_BYTES", 10)
    assert seal(KEY, bytes(10), b"")
    with pytest.raises(VaultError, match="11 bytes") as caught:
        seal(KEY, bytes(11), b"")
    assert caught.value.code == "vault.too-large"


def test_the_cipher_takes_what_is_said_to_be_the_most() -> None:
    assert sealing.MOST_BYTES + sealing.TAG_BYTES == 2**31 - 1


@pytest.mark.parametrize(
    ("passphrase", "salt", "n", "p", "expected"),
    [
        (
            "pleaseletmein",
            b"SodiumChloride",
            16384,
            1,
            "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2",
        ),
        ("password", b"NaCl", 1024, 16, "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"),
    ],
)
def test_scrypt_is_that_of_rfc_7914(passphrase: str, salt: bytes, n: int, p: int, expected: str) -> None:
    """Section 12 gives 64 bytes; the first 32 do not depend on how many are asked for."""
    assert key_from_passphrase(passphrase, salt, n, 8, p).hex() == expected


@given(passphrase=st.text(max_size=20), salt=st.binary(min_size=16, max_size=16))
def test_scrypt_is_that_of_the_standard_library(passphrase: str, salt: bytes) -> None:
    text = unicodedata.normalize("NFC", passphrase).encode()
    assert key_from_passphrase(passphrase, salt, 2, 8, 1) == hashlib.scrypt(text, salt=salt, n=2, r=8, p=1, dklen=32)


def test_a_passphrase_is_the_same_from_every_keyboard() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert key_from_passphrase(composed, b"s" * 16, 2, 8, 1) == key_from_passphrase(decomposed, b"s" * 16, 2, 8, 1)


def test_one_key_leads_to_different_keys_for_different_vaults_and_purposes() -> None:
    key = secrets.token_bytes(32)
    derived = {key_from_key(key, bytes([salt]) * 16, label) for salt in range(5) for label in ("vault", "export")}
    assert len(derived) == 10
    assert key not in derived
