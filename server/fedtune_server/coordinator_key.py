"""The coordinator's signing key: Ed25519 in an unencrypted PKCS8 PEM file that only its owner can read."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedtune.errors import WitnessError
from fedtune.run.files import disk_errors, sync_folder


def coordinator_key(path: Path) -> Ed25519PrivateKey:
    """Return the key in a file, after making it where there is none.

    Errors: `witness.damaged-key`, `run.unwritable`, `run.disk-full`.
    """
    if not path.exists():
        _write(path, Ed25519PrivateKey.generate())
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _damaged(path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _damaged(path)
    return key


def _write(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a key whole, readable by its owner alone from the first byte."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)


def _damaged(path: Path) -> WitnessError:
    hint = "restore it from a backup; receipts that it signed cannot be continued with another"
    return WitnessError("damaged-key", f"{path} cannot be read as an Ed25519 key", hint=hint)
