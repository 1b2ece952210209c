"""The header of a vault or an export: how its data key is wrapped. Makes, reads and opens it; knows no file.

A header is data from a disk that others may have written: it is read strictly, one spelling only, and it cannot ask for
more than 1 GiB and some seconds of scrypt.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import rfc8785
from cryptography.exceptions import InvalidTag
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedtune.errors import VaultError
from fedtune_client.vault.sealing import (
    KEY_BYTES,
    NONCE_BYTES,
    SALT_BYTES,
    TAG_BYTES,
    context,
    key_from_key,
    key_from_passphrase,
    new_key,
    seal,
    unseal,
)
from fedtune_client.vault.unlock import Key, Passphrase, Unlock

VERSION: Final = 1
MOST_HEADER_BYTES = 4096
_WRAPPED_BYTES = NONCE_BYTES + KEY_BYTES + TAG_BYTES


def _power_of_two(n: int) -> int:
    if n & (n - 1):
        raise ValueError("not a power of two")
    return n


Salt = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * SALT_BYTES}}}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ScryptKdf(_Strict):
    """scrypt of a passphrase: 128·n·r bytes of memory, time in proportion to n·r·p."""

    name: Literal["scrypt"] = "scrypt"
    salt: Salt
    n: Annotated[int, Field(ge=2**14, le=2**20), AfterValidator(_power_of_two)] = 2**17
    r: Literal[8] = 8
    p: Annotated[int, Field(ge=1, le=4)] = 1


class HkdfKdf(_Strict):
    """HKDF-SHA256 of a key."""

    name: Literal["hkdf-sha256"] = "hkdf-sha256"
    salt: Salt


class Header(_Strict):
    """What `vault.json` says: whose data key this is, how its wrapping key is derived, and the wrapped data key."""

    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    generation: Annotated[int, Field(ge=1, lt=2**53)]
    kdf: Annotated[ScryptKdf | HkdfKdf, Field(discriminator="name")]
    wrapped: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * _WRAPPED_BYTES}}}$")] = "00" * _WRAPPED_BYTES

    def to_bytes(self) -> bytes:
        """Return the one spelling of this header, with its checksum."""
        content = self.model_dump(mode="json")
        return rfc8785.dumps({**content, "checksum": _checksum(content)}) + b"\n"

    def bound_to(self, label: str) -> bytes:
        """Return what the wrapped key is bound to: everything else in this header."""
        return context(label, rfc8785.dumps(self.model_dump(mode="json", exclude={"wrapped"})).decode())

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Header:
        """Read a header; whatever is not exactly what `to_bytes` writes is `vault.damaged`."""
        try:
            content = json.loads(raw)
            if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
                raise damaged(where, "its checksum is not its content's")
            if content.get("version") != VERSION:
                raise _unknown_version(content.get("version"), where)
            header = cls.model_validate(content)
        except (ValueError, RecursionError) as error:  # a ValidationError is a ValueError
            problem = _first(error) if isinstance(error, ValidationError) else "it is not JSON"
            raise damaged(where, problem) from error
        if header.to_bytes() != raw:
            raise damaged(where, "it is not spelled as a header is")
        return header


@dataclass(frozen=True, slots=True)
class Opened:
    """A header with the keys it leads to."""

    header: Header
    wrapping_key: bytes = field(repr=False)
    data_key: bytes = field(repr=False)


def new(unlock: Unlock, label: str) -> Opened:
    """Return a header with a random id and a random data key. Error: `vault.weak-passphrase`."""
    header = Header(id=secrets.token_hex(16), generation=1, kdf=_new_kdf(unlock))
    return _wrap(header, _derive(unlock, header.kdf, label), new_key(), label)


def opened(header: Header, unlock: Unlock, label: str, where: str) -> Opened:
    """Return a header's data key. Error: `vault.wrong-key`."""
    wrapping_key = _derive(unlock, header.kdf, label, where)
    found = unwrap(header, wrapping_key, label)
    if found is None:
        what = "passphrase" if isinstance(unlock, Passphrase) else "key"
        raise VaultError("wrong-key", f"{where} is not sealed with this {what}", hint=_WHICH_KEY)
    return found


def unwrap(header: Header, wrapping_key: bytes, label: str) -> Opened | None:
    """Return a header's data key, or None if another key wrapped it."""
    try:
        data_key = unseal(wrapping_key, bytes.fromhex(header.wrapped), header.bound_to(label))
    except InvalidTag:
        return None
    return Opened(header, wrapping_key, data_key)


def rewrapped(old: Opened, unlock: Unlock, label: str) -> Opened:
    """Return the same data key under another passphrase or key. Error: `vault.weak-passphrase`."""
    header = old.header.model_copy(update={"kdf": _new_kdf(unlock)})
    return _wrap(header, _derive(unlock, header.kdf, label), old.data_key, label)


def rotated(old: Opened, label: str) -> Opened:
    """Return a new data key, of the next generation, under the same passphrase or key."""
    header = old.header.model_copy(update={"generation": old.header.generation + 1})
    return _wrap(header, old.wrapping_key, new_key(), label)


def _derive(unlock: Unlock, kdf: ScryptKdf | HkdfKdf, label: str, where: str = "it") -> bytes:
    salt = bytes.fromhex(kdf.salt)
    if isinstance(unlock, Passphrase) and isinstance(kdf, ScryptKdf):
        try:
            return key_from_passphrase(unlock.text, salt, kdf.n, kdf.r, kdf.p)
        except MemoryError:
            hint = "free some memory, or seal it with a key file instead"
            message = f"scrypt needs {128 * kdf.n * kdf.r // 2**20} MiB of memory, and they are not there"
            raise VaultError("no-memory", message, hint=hint) from None
    if isinstance(unlock, Key) and isinstance(kdf, HkdfKdf):
        return key_from_key(unlock.data, salt, label)
    wanted, given = ("passphrase", "key") if isinstance(kdf, ScryptKdf) else ("key", "passphrase")
    raise VaultError("wrong-key", f"{where} is sealed with a {wanted}, and a {given} is given", hint=_WHICH_KEY)


def damaged(where: str, problem: str) -> VaultError:
    """Return the error for bytes that are not what a vault has written."""
    return VaultError("damaged", f"{where} is damaged: {problem}", hint="restore the vault from an export or a backup")


_WHICH_KEY = (
    "give what it was sealed with: --key-file, FEDTUNE_VAULT_KEY_FILE, FEDTUNE_VAULT_KEY, FEDTUNE_VAULT_PASSPHRASE or "
    "the prompt; the first of them that is set is used"
)


def _new_kdf(unlock: Unlock) -> ScryptKdf | HkdfKdf:
    unlock.check()
    salt = secrets.token_hex(SALT_BYTES)
    return ScryptKdf(salt=salt) if isinstance(unlock, Passphrase) else HkdfKdf(salt=salt)


def _wrap(header: Header, wrapping_key: bytes, data_key: bytes, label: str) -> Opened:
    wrapped = seal(wrapping_key, data_key, header.bound_to(label)).hex()
    return Opened(header.model_copy(update={"wrapped": wrapped}), wrapping_key, data_key)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(rfc8785.dumps(content)).hexdigest()


def _first(error: ValidationError) -> str:
    first: Any = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


def _unknown_version(version: object, where: str) -> VaultError:
    message = f"{where} is of version {str(version)[:20]}, this fedtune reads version {VERSION}"
    return VaultError("unknown-version", message, hint="open it with the fedtune that wrote it, or restore an export")
