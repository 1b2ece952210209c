"""The coordinator's signing key: Ed25519 in an unencrypted PKCS8 PEM file that only its owner can read."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedtune.errors import RunError, WitnessError
from fedtune.run.private_files import PrivateFiles

_FILES = PrivateFiles(RunError, one_writer=True)


def coordinator_key(path: Path) -> Ed25519PrivateKey:
    """Return the key in a file, after making it where there is none.

    Errors: `witness.damaged-key`, `run.unwritable`, `run.disk-full`.
    """
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        _FILES.write(path, [key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())])
    try:
        read = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _damaged(path) from error
    if not isinstance(read, Ed25519PrivateKey):
        raise _damaged(path)
    return read


def _damaged(path: Path) -> WitnessError:
    hint = "restore it from a backup; receipts that it signed cannot be continued with another"
    return WitnessError("damaged-key", f"{path} cannot be read as an Ed25519 key", hint=hint)
