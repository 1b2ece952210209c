"""Who may sign: names and their Ed25519 public keys, asked anew at each message, so that a revocation holds at once.

A peer has one key in force. A rotation, signed by the old key and by the new one, retires the old key: it stays good
for what it signed until that moment. A rotation is no answer to a stolen key, whose thief can write any time into a
header; a stolen key is revoked, and then nothing that it ever signed is taken. Knows no message and no certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedtune.errors import EnvelopeError
from fedtune.journal.entries import Hash, SiteName
from fedtune.run.files import write_whole

ROTATION = b"fedtune peer rotation v1\n"


@dataclass(frozen=True, slots=True)
class PeerKey:
    """A public key (64 hexadecimal digits); `until` is when it was replaced, in milliseconds since 1970."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")
    key: Hash
    until: Annotated[int, Field(strict=True, ge=0, lt=10**15)] | None = None
    revoked: Annotated[bool, Field(strict=True)] = False


Known: TypeAlias = Mapping[str, tuple[PeerKey, ...]]


@dataclass(frozen=True, slots=True)
class Standing:
    """What a key counts for: how many keys its peer had before it, and until when it could sign."""

    generation: int
    until: int | None


class Peers:
    """The peers that `load` returns; it is called for each question, because an answer is only as good as it is new."""

    def __init__(self, load: Callable[[], Known]) -> None:
        self._load = load

    def standing(self, name: str, key: str) -> Standing:
        """Return what a key that claims to be a peer's counts for.

        Errors: `envelope.unknown-sender`, `envelope.unknown-key`, `envelope.revoked`, and what `load` raises.
        """
        keys = self._load().get(name)
        if not keys:
            raise EnvelopeError("unknown-sender", f"{name} is not enrolled", hint="enrol it first")
        for generation, known in enumerate(keys):
            if known.key == key:
                if known.revoked:
                    raise EnvelopeError("revoked", f"a key of {name} was revoked", hint="enrol it anew to go on")
                return Standing(generation, known.until)
        raise EnvelopeError("unknown-key", f"{name} has no key {key[:16]}…", hint="tell its rotation first")

    def is_active(self, name: str) -> bool:
        """Whether a peer has a key that can sign now: nothing is sent to one that has none."""
        return any(_in_force(known) for known in self._load().get(name, ()))


@dataclass(frozen=True, slots=True)
class Rotation:
    """A peer's statement that `new` replaces `old` at a moment, signed by both keys."""

    federation: str
    name: str
    old: str
    new: str
    at: int
    old_signature: str
    new_signature: str

    @classmethod
    def sign(cls, federation: str, name: str, keys: tuple[Ed25519PrivateKey, Ed25519PrivateKey], at: int) -> Rotation:
        """Let the keys, the old one first, state that the second replaces the first."""
        old, new = (key.public_key().public_bytes_raw().hex() for key in keys)
        statement = _statement(federation, name, old, new, at)
        return cls(federation, name, old, new, at, *(key.sign(statement).hex() for key in keys))

    def check(self) -> None:
        """Refuse a rotation that either key has not signed: `envelope.forged`."""
        statement = _statement(self.federation, self.name, self.old, self.new, self.at)
        for key, signature in ((self.old, self.old_signature), (self.new, self.new_signature)):
            try:
                Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), statement)
            except (InvalidSignature, ValueError) as error:
                hint = "ask the peer for it again, by another way"
                raise EnvelopeError("forged", "a rotation is not signed by both its keys", hint=hint) from error


def enrolled(known: Known, name: str, key: str) -> Known:
    """Return the peers with one more key in force, that of a new peer or of one whose keys are all revoked.

    Errors: `envelope.already-enrolled`, `envelope.key-taken` for a key that any peer ever had.
    """
    if any(_in_force(mine) for mine in known.get(name, ())):
        raise EnvelopeError("already-enrolled", f"{name} has a key in force", hint="revoke it, or rotate it")
    _require_new(known, key)
    return {**known, name: (*known.get(name, ()), PeerKey(key))}


def rotated(known: Known, rotation: Rotation, federation: str, now: int) -> Known:
    """Return the peers after a rotation, which takes effect when its peer said, but not later than now.

    Errors: `envelope.forged`, `envelope.other-federation`, `envelope.unknown-key` unless the old key is in force,
    `envelope.key-taken`.
    """
    rotation.check()
    if rotation.federation != federation:
        raise EnvelopeError("other-federation", "the rotation is for another federation", hint="ask its peer")
    *before, last = known.get(rotation.name, ()) or (PeerKey(""),)
    if last.key != rotation.old or not _in_force(last):
        raise EnvelopeError("unknown-key", f"the key that {rotation.name} replaces is not in force", hint="enrol anew")
    _require_new(known, rotation.new)
    retired = replace(last, until=max(0, min(rotation.at, now)))
    return {**known, rotation.name: (*before, retired, PeerKey(rotation.new))}


def revoked(known: Known, name: str) -> Known:
    """Return the peers with all keys of one revoked; they stay listed, so that nobody enrols them again."""
    if name not in known:
        raise EnvelopeError("unknown-sender", f"{name} is not enrolled", hint="list who is")
    return {**known, name: tuple(replace(key, revoked=True) for key in known[name])}


class _File(BaseModel):
    """The file's form."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    peers: dict[SiteName, tuple[PeerKey, ...]]
    version: Literal[1]


class PeerFile:
    """Peers in one file of canonical JSON, replaced whole; calling it reads the file, as `Peers` wants it.

    One process changes it at a time. Without its file nobody is known: `envelope.no-peers`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: tuple[bytes, Known] = (b"", {})

    def __call__(self) -> Known:
        """Return the peers as they are on disk now. Error: `envelope.no-peers`."""
        try:
            raw = self.path.read_bytes()
            if raw != self._read[0]:
                self._read = (raw, _FILES.validate_json(raw).peers)
        except (OSError, ValidationError) as error:
            hint = "restore it from a backup; no message is taken before"
            raise EnvelopeError("no-peers", f"{self.path} does not say who may sign", hint=hint) from error
        return self._read[1]

    def write(self, known: Known) -> None:
        """Replace the file. Errors: `run.unwritable`, `run.disk-full`."""
        plain: dict[str, Any] = {
            name: [{"key": key.key, "revoked": key.revoked, "until": key.until} for key in keys]
            for name, keys in known.items()
        }
        write_whole(self.path, rfc8785.dumps({"peers": plain, "version": 1}) + b"\n")


def _statement(federation: str, name: str, old: str, new: str, at: int) -> bytes:
    return ROTATION + rfc8785.dumps({"at": at, "federation": federation, "name": name, "new": new, "old": old})


def _in_force(key: PeerKey) -> bool:
    return key.until is None and not key.revoked


def _require_new(known: Known, key: str) -> None:
    if any(held.key == key for keys in known.values() for held in keys):
        raise EnvelopeError("key-taken", f"the key {key[:16]}… is or was a peer's", hint="make a new key")


_FILES = TypeAdapter(_File)
