"""What is signed: the header of a message, which names everything that the message could be mistaken for.

A header is canonical JSON (RFC 8785) of thirteen fields in one fixed form, at most 1,100 bytes of ASCII; `body` is the
SHA-256 of what travels with it. The signature is Ed25519 (RFC 8032) over the context label and the header's bytes. One
regular expression reads a header, so nothing that was not signed ever reaches a parser. The rules of `verify`:

1. the header has exactly the fixed form: no other spelling of the same fields is read;
2. the key that it names is one of its sender's, not revoked, and where that key was replaced, signed before it was;
3. the signature verifies under that key.

What a header must say to be taken is `Expected`; when, `check_time`; how often, `fedtune.envelopes.streams`. Knows no
body, no file and no transport.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtune.envelopes.peers import Peers
from fedtune.errors import EnvelopeError

CONTEXT = b"fedtune envelope v1\n"
COORDINATOR = "coordinator"  # the name that a coordinator signs with; no site may have it
SKEW = 120_000  # milliseconds that two clocks may be apart
LIFETIME = 7 * 24 * 3_600_000  # milliseconds between `issued` and `expires`, at most

Direction = Literal["request", "answer"]

_HASH, _NAME, _NUMBER = r"[0-9a-f]{64}", r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", r"0|[1-9][0-9]{0,14}"
_TEXTS = {
    "body": _HASH,
    "direction": "request|answer",
    "federation": _NAME,
    "key": _HASH,
    "kind": r"[a-z][a-z0-9-]{0,31}",
    "receiver": _NAME,
    "reply_to": f"(?:{_HASH})?",
    "sender": _NAME,
    "study": _HASH,
}
_NUMBERS = {"expires", "issued", "round", "sequence"}
_FORM = re.compile(
    (
        r"\{"
        + ",".join(
            f'"{name}":(?P<{name}>{_NUMBER})' if name in _NUMBERS else f'"{name}":"(?P<{name}>{_TEXTS[name]})"'
            for name in sorted({*_TEXTS, *_NUMBERS})
        )
        + r"\}"
    ).encode()
)


@dataclass(frozen=True, slots=True)
class Header:
    """What a message says of itself: times in milliseconds since 1970 (UTC), hashes and `key` in hexadecimal digits.

    `study` is the plan's SHA-256, `sequence` counts within (sender, receiver, study, direction), and `reply_to` is the
    digest of the request that an answer answers; empty in a request.
    """

    federation: str
    study: str
    round: int
    sender: str
    receiver: str
    sequence: int
    direction: Direction
    kind: str
    issued: int
    expires: int
    reply_to: str
    body: str
    key: str

    def to_bytes(self) -> bytes:
        """Return the one spelling of this header. Error: `envelope.bad-header` for fields that no header has."""
        raw = json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()
        read_header(raw)
        return raw


@dataclass(frozen=True)
class Envelope:
    """A header's bytes and their signature; nothing of it is believed before `verify` has returned."""

    raw: bytes
    signature: bytes

    @classmethod
    def sign(cls, header: Header, key: Ed25519PrivateKey) -> Envelope:
        """Sign a header that names this key."""
        raw = header.to_bytes()
        if header.key != key.public_key().public_bytes_raw().hex():
            raise ValueError("the header names another key than the one that signs")
        return cls(raw, key.sign(CONTEXT + raw))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the header, which is what an answer names; a second signature of it changes nothing."""
        return hashlib.sha256(self.raw).hexdigest()

    @cached_property
    def header(self) -> Header:
        """The header as it claims to be. Error: `envelope.bad-header`."""
        return read_header(self.raw)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a message must be to be taken here; `round` and `reply_to` are None where any will do."""

    federation: str
    study: str
    sender: str
    receiver: str
    direction: Direction
    kind: str
    round: int | None = None
    reply_to: str | None = None

    def check(self, header: Header) -> None:
        """Refuse a message of another place: `envelope.other-study`, `.other-sender` and so on, by the first field."""
        for name in self.__slots__:
            wanted = getattr(self, name)
            if wanted is not None and getattr(header, name) != wanted:
                what = name.replace("_", "-")
                raise EnvelopeError(f"other-{what}", f"the message of {header.sender} is for another {what}", hint=_LOG)
        if (header.direction == "answer") != bool(header.reply_to):
            raise EnvelopeError("other-reply-to", "an answer names its request, and nothing else does", hint=_LOG)


def read_header(raw: bytes) -> Header:
    """Read a header by its form alone. Error: `envelope.bad-header`."""
    found = _FORM.fullmatch(raw)
    if found is None:
        raise EnvelopeError("bad-header", "an envelope's header does not have its form", hint=_UPGRADE)
    fields = {name: value.decode() for name, value in found.groupdict().items()}
    return Header(**{name: int(value) if name in _NUMBERS else value for name, value in fields.items()})  # type: ignore[arg-type] # the expression has checked each


def verify(envelope: Envelope, peers: Peers) -> tuple[Header, int]:
    """Return the header that its sender has signed, and how many keys the sender had before the one that signed it.

    Errors: `envelope.bad-header`, `envelope.forged`, `envelope.retired-key`, those of `Peers.standing`.
    """
    header = envelope.header
    standing = peers.standing(header.sender, header.key)
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(header.key)).verify(envelope.signature, CONTEXT + envelope.raw)
    except (InvalidSignature, ValueError) as error:
        raise EnvelopeError("forged", f"the message is not signed by {header.sender}", hint=_LOG) from error
    if standing.until is not None and header.issued > standing.until:
        raise EnvelopeError("retired-key", f"{header.sender} has replaced the key that signed", hint=_LOG)
    return header, standing.generation


def check_time(header: Header, now: int) -> None:
    """Refuse a message that is not for this moment; clocks may be `SKEW` apart.

    Errors: `envelope.expired`, `envelope.not-yet`, `envelope.long-lived` for a life of more than `LIFETIME`.
    """
    if not 0 <= header.expires - header.issued <= LIFETIME:
        hint = "a message lives for seven days at most: shorten the plan's deadline"
        raise EnvelopeError("long-lived", f"the message of {header.sender} lives too long or not at all", hint=hint)
    if header.issued > now + SKEW:
        raise EnvelopeError("not-yet", f"the message of {header.sender} was signed in the future", hint=_CLOCK)
    if header.expires < now - SKEW:
        raise EnvelopeError("expired", f"the message of {header.sender} has expired", hint=_CLOCK)


_LOG = "it was refused unread; if nobody attacks, look at the transport between the two"
_UPGRADE = "upgrade the older side"
_CLOCK = "compare the clocks of both machines: they may be two minutes apart"
