"""The numbers of one stream, as its sender and its receiver keep them: state machines without I/O.

A stream is everything that one sender tells one receiver in one study and direction. The rules:

1. a sender's numbers strictly increase, with gaps; none is less than the time in milliseconds, so that a sender whose
   memory was put back or lost does not use a number again;
2. a receiver takes a number that is higher than every number before, whatever was lost in between;
3. once a newer key of the sender has spoken, an older one is not heard again;
4. an answer is taken if it answers the newest request, once;
5. the newest request itself may come again, byte for byte, since a transport delivers again what it does not know to
   have arrived; it is taken `DELIVERIES` times at most and answered by the answer that was kept, if there is one.

A state is a high-water mark and the newest message's header, whatever the number of messages before it.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.envelopes.envelope import Direction, Envelope, Header
from fedtune.errors import EnvelopeError

DELIVERIES = 4


@dataclass(frozen=True, slots=True)
class Stream:
    """What a sequence of numbers belongs to."""

    sender: str
    receiver: str
    study: str
    direction: Direction

    @classmethod
    def of(cls, header: Header) -> Stream:
        """Return the stream that a message is in."""
        return cls(header.sender, header.receiver, header.study, header.direction)


@dataclass(frozen=True, slots=True)
class Letter:
    """What a sender wants to say in a stream: `body` is a SHA-256, `lifetime` is in milliseconds."""

    federation: str
    stream: Stream
    round: int
    kind: str
    body: str
    lifetime: int
    reply_to: str = ""


@dataclass(frozen=True, slots=True)
class Sender:
    """A stream as its sender keeps it: the newest envelope that it has signed."""

    newest: Envelope | None = None

    def sign(self, letter: Letter, key: Ed25519PrivateKey, now: int) -> tuple[Sender, Envelope]:
        """Return the state to keep, durably, before the envelope leaves; `now` is in milliseconds since 1970."""
        before = -1 if self.newest is None else self.newest.header.sequence
        header = Header(
            federation=letter.federation,
            study=letter.stream.study,
            round=letter.round,
            sender=letter.stream.sender,
            receiver=letter.stream.receiver,
            sequence=max(before + 1, now),
            direction=letter.stream.direction,
            kind=letter.kind,
            issued=now,
            expires=now + letter.lifetime,
            reply_to=letter.reply_to,
            body=letter.body,
            key=key.public_key().public_bytes_raw().hex(),
        )
        envelope = Envelope.sign(header, key)
        return Sender(envelope), envelope

    def to_bytes(self) -> bytes:
        """Return the state as it is kept."""
        return _dump({"newest": _envelope_out(self.newest)})

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> Sender:
        """Return what was kept; None is a stream that has not begun."""
        return cls() if raw is None else cls(_envelope_in(_load(raw, cls().to_bytes())["newest"]))


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer as it was signed, and the small part of its body; the large part is kept elsewhere, or made again."""

    envelope: Envelope
    frame: bytes


@dataclass(frozen=True, slots=True)
class Receiver:
    """A stream as its receiver keeps it: the newest message, how often it came, and what was answered to it."""

    sequence: int = -1
    digest: str = ""
    reply_to: str = ""
    generation: int = 0
    deliveries: int = 0
    kept: Kept | None = None

    def accept(self, header: Header, digest: str, generation: int) -> Receiver:
        """Return the state to keep, durably, before the message is acted on; `deliveries` is 1 when it is new.

        The header was verified; `generation` is its key's. Errors: `envelope.replayed`, `envelope.retired-key`,
        `envelope.answered` for a second answer to one request.
        """
        if header.sequence == self.sequence and digest == self.digest and header.direction == "request":
            if self.deliveries < DELIVERIES:
                return replace(self, deliveries=self.deliveries + 1)
            raise EnvelopeError("replayed", f"a request of {header.sender} came {DELIVERIES} times", hint=_ASK)
        if header.sequence <= self.sequence:
            raise EnvelopeError("replayed", f"a message of {header.sender} came before, or too late", hint=_ASK)
        if generation < self.generation:
            raise EnvelopeError("retired-key", f"{header.sender} signs with a newer key by now", hint=_ASK)
        if header.reply_to and header.reply_to == self.reply_to:
            raise EnvelopeError("answered", f"{header.sender} has answered that request before", hint=_ASK)
        return Receiver(header.sequence, digest, header.reply_to, generation, 1)

    def answered(self, digest: str, kept: Kept) -> Receiver:
        """Return the state that keeps an answer, unless a newer request has come meanwhile."""
        return replace(self, kept=kept) if digest == self.digest else self

    def to_bytes(self) -> bytes:
        """Return the state as it is kept."""
        kept = self.kept and {"envelope": _envelope_out(self.kept.envelope), "frame": _text(self.kept.frame)}
        return _dump(
            {
                "deliveries": self.deliveries,
                "digest": self.digest,
                "generation": self.generation,
                "kept": kept,
                "reply_to": self.reply_to,
                "sequence": self.sequence,
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes | None) -> Receiver:
        """Return what was kept; None is a stream that has not begun."""
        if raw is None:
            return cls()
        fields = _load(raw, cls().to_bytes())
        kept = fields.pop("kept")
        envelope = _envelope_in(kept["envelope"]) if kept else None
        return cls(**fields, kept=Kept(envelope, base64.b64decode(kept["frame"])) if envelope else None)


def damaged_memory(what: str, why: str) -> EnvelopeError:
    """Return the error for a memory that is not what was written; nothing is sent or taken then."""
    hint = "move it away and start again: what was signed before is then refused, and has to be asked anew"
    return EnvelopeError("damaged-memory", f"{what} cannot be read ({why})", hint=hint)


def _envelope_out(envelope: Envelope | None) -> list[str] | None:
    return None if envelope is None else [envelope.raw.decode(), envelope.signature.hex()]


def _envelope_in(value: list[str] | None) -> Envelope | None:
    return None if value is None else Envelope(value[0].encode(), bytes.fromhex(value[1]))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _load(raw: bytes, form: bytes) -> dict[str, Any]:
    """Return the fields of a state, which are those of an empty one."""
    try:
        fields = json.loads(raw)
        if set(fields) == set(json.loads(form)):
            return dict(fields)
    except (ValueError, TypeError):
        pass
    raise damaged_memory("the memory of a stream", "it is not a state")


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


_ASK = "whoever needs it asks anew"
