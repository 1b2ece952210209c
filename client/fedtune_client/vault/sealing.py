"""Sealing bytes with AES-256-GCM, and wrapping keys from passphrases or keys: pure functions, no file, no vault."""

from __future__ import annotations

import secrets
import unicodedata

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedtune.errors import VaultError

KEY_BYTES = 32
SALT_BYTES = 16
NONCE_BYTES = 12
TAG_BYTES = 16
MOST_BYTES = 2**31 - 1 - TAG_BYTES  # what one call of the cipher takes


def new_key() -> bytes:
    """Return 256 random bits."""
    return secrets.token_bytes(KEY_BYTES)


def context(label: str, *parts: str) -> bytes:
    """Join what a sealed item is bound to; no part holds a newline, so no two lists of parts join to the same bytes."""
    return "\n".join((label, *parts)).encode()


def seal(key: bytes, data: bytes, bound_to: bytes) -> bytes:
    """Return nonce ‖ ciphertext ‖ tag: NONCE_BYTES + len(data) + TAG_BYTES bytes, of a fresh random nonce.

    A nonce that came twice under one key would give the data away. With 96 random bits the chance is below 2⁻³² up to
    2³² sealings under one key (NIST SP 800-38D, 8.3): a million a day for ten years, and each rotation starts anew.
    """
    if len(data) > MOST_BYTES:
        hint = f"keep at most {MOST_BYTES} bytes in one item"
        raise VaultError("too-large", f"an item of {len(data)} bytes is too large to be sealed", hint=hint)
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, data, bound_to)


def unseal(key: bytes, sealed: bytes, bound_to: bytes) -> bytes:
    """Return the data; raise `InvalidTag` unless key, bytes and what they are bound to are exactly those of `seal`."""
    if len(sealed) < NONCE_BYTES + TAG_BYTES:
        raise InvalidTag
    return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound_to)


def key_from_passphrase(passphrase: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    """Return scrypt (RFC 7914) of a passphrase in Unicode NFC, so that every keyboard's é is one.

    It takes 128·n·r bytes of memory and time in proportion to n·r·p.
    """
    text = unicodedata.normalize("NFC", passphrase).encode()
    return Scrypt(salt=salt, length=KEY_BYTES, n=n, r=r, p=p).derive(text)


def key_from_key(key: bytes, salt: bytes, label: str) -> bytes:
    """Return HKDF-SHA256 (RFC 5869) of a key that is random already: one key may unlock many vaults and exports."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=label.encode()).derive(key)
