"""A site's signing keys in its vault: Ed25519, numbered, the highest in force, the older ones kept as proof.

Knows no journal: that a new key is in force is said there (`key-rotated`).
"""

from __future__ import annotations

import re

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import VaultError
from fedtune_client.vault.header import damaged
from fedtune_client.vault.store import Vault

_NAME = re.compile(r"signing-(\d{4,9})")


def create_signing_key(vault: Vault) -> Ed25519PrivateKey:
    """Make the site's first signing key. Error: `vault.exists` when it has one."""
    if names := _names(vault):
        hint = "use it, or rotate it"
        raise VaultError("exists", f"the vault {vault.folder} already holds {names[-1]}", hint=hint)
    return _add(vault, 1)


def add_signing_key(vault: Vault) -> Ed25519PrivateKey:
    """Make the next signing key, for a rotation; the older ones stay. Error: `vault.no-item` without a first one."""
    return _add(vault, _number(_newest(vault)) + 1)


def signing_key(vault: Vault, public_key: str = "") -> Ed25519PrivateKey:
    """Return the newest signing key, or the one whose public half this is (64 hexadecimal digits).

    A rotation that was cut short leaves a newer key than the journal names: ask for the one that the journal names.
    Error: `vault.no-item`.
    """
    if not public_key:
        return _read(vault, _newest(vault))
    for name in reversed(_names(vault)):
        key = _read(vault, name)
        if key.public_key().public_bytes_raw().hex() == public_key:
            return key
    message = f"the vault {vault.folder} does not hold the key {public_key[:64]}"
    raise VaultError("no-item", message, hint="restore the vault from an export or a backup")


def _add(vault: Vault, number: int) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    vault.put(f"signing-{number:04d}", key.private_bytes_raw(), replace=False)
    return key


def _read(vault: Vault, name: str) -> Ed25519PrivateKey:
    try:
        return Ed25519PrivateKey.from_private_bytes(vault.get(name))
    except ValueError:
        raise damaged(f"the item {name} of the vault {vault.folder}", "it is not an Ed25519 key") from None


def _newest(vault: Vault) -> str:
    names = _names(vault)
    if not names:
        hint = "make the site first: fedtune client init"
        raise VaultError("no-item", f"the vault {vault.folder} holds no signing key", hint=hint)
    return names[-1]


def _names(vault: Vault) -> list[str]:
    return sorted((name for name in vault.names() if _NAME.fullmatch(name)), key=_number)


def _number(name: str) -> int:
    return int(name.removeprefix("signing-"))
