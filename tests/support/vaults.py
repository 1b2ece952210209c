"""Vaults for tests, and their format read by code that shares nothing with the vault's own."""

from __future__ import annotations

import hashlib
import hmac
import json
import unicodedata
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedtune_client.vault import Key, Vault

KEY = Key(bytes(range(32)))
OTHER = Key(bytes(32))
ITEMS = {"signing-0001": b"\x01" * 32, "update-7": bytes(range(256)) * 20, "empty": b""}


def make_vault(folder: Path, key: Key = KEY, items: dict[str, bytes] | None = None) -> Vault:
    vault = Vault.create(folder, key)
    for name, data in (ITEMS if items is None else items).items():
        vault.put(name, data)
    return vault


def contents(vault: Vault) -> dict[str, bytes]:
    return {name: vault.get(name) for name in vault.names()}


def read_vault(folder: Path, secret: str | bytes) -> dict[str, bytes]:
    """Decrypt a whole vault, straight from the documented format."""
    header = json.loads((folder / "vault.json").read_bytes())
    key = _data_key(header, secret, "fedtune vault v1")
    items = folder / f"items-{header['generation']:06d}"
    return {
        path.name.removesuffix(".sealed"): _open(
            key, path.read_bytes(), f"fedtune vault item v1\n{header['id']}\n{path.name.removesuffix('.sealed')}"
        )
        for path in items.iterdir()
    }


def read_export(path: Path, secret: str | bytes) -> dict[str, bytes]:
    """Decrypt an export, straight from the documented format."""
    line, rest = path.read_bytes().split(b"\n", 1)
    header, index = json.loads(line), 0
    found: dict[str, bytes] = {}
    key = _data_key(header, secret, "fedtune vault export v1")
    while True:
        length = int.from_bytes(rest[:8], "big")
        text = _open(key, rest[8 : 8 + length], f"fedtune vault export item v1\n{header['id']}\n{index}")
        rest, index = rest[8 + length :], index + 1
        if text == b"end\n":
            assert rest == b""
            return found
        kind, name, data = text.split(b"\n", 2)
        assert kind == b"item"
        found[name.decode()] = data


def _data_key(header: dict[str, Any], secret: str | bytes, label: str) -> bytes:
    kdf, salt = header["kdf"], bytes.fromhex(header["kdf"]["salt"])
    if isinstance(secret, str):
        passphrase = unicodedata.normalize("NFC", secret).encode()
        cost = {name: kdf[name] for name in ("n", "r", "p")}
        wrapping = hashlib.scrypt(passphrase, salt=salt, **cost, maxmem=2**28, dklen=32)
    else:
        extracted = hmac.digest(salt, secret, "sha256")
        wrapping = hmac.digest(extracted, label.encode() + b"\x01", "sha256")
    bound = {name: header[name] for name in ("generation", "id", "kdf", "version")}
    text = json.dumps(bound, sort_keys=True, separators=(",", ":"))
    return _open(wrapping, bytes.fromhex(header["wrapped"]), f"{label}\n{text}")


def _open(key: bytes, sealed: bytes, bound_to: str) -> bytes:
    return AESGCM(key).decrypt(sealed[:12], sealed[12:], bound_to.encode())
