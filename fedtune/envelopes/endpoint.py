"""One party's end of its streams: verifies, remembers on disk, and only then lets anybody act or send.

The order of taking a message: form of the header → its sender's standing, asked now → signature → what it must say →
its time → its number, without writing → the body's hash → its number, on disk. A refusal at any step leaves the memory
as it was, so that no forged, swapped or misplaced message spends the number of an honest one. Knows digests of bodies,
not bodies; `fedtune.flower.sealed` puts both together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.envelopes.envelope import Envelope, Expected, Header, check_time, verify
from fedtune.envelopes.nonces import Change, Clock, Nonces, unix_ms
from fedtune.envelopes.peers import Peers
from fedtune.envelopes.streams import Kept, Letter, Receiver, Sender, Stream
from fedtune.errors import EnvelopeError

_TRIES = 8


@dataclass(frozen=True, slots=True)
class Question:
    """What one peer is asked; `body` is the SHA-256 of the message's body."""

    receiver: str
    study: str
    round: int
    kind: str
    body: str


@dataclass(frozen=True, slots=True)
class Taken:
    """A message that was verified and written down: it may be acted on.

    `again` is whether it came before, and `kept` what was answered to it then.
    """

    header: Header
    digest: str
    again: bool
    kept: Kept | None


class Endpoint:
    """A party with its name, its key, its peers and its memory."""

    def __init__(
        self,
        name: str,
        federation: str,
        key: Ed25519PrivateKey,
        peers: Peers,
        nonces: Nonces,
        *,
        clock: Clock = unix_ms,
    ) -> None:
        self.name, self.federation, self.peers = name, federation, peers
        self._key, self._nonces, self._clock = key, nonces, clock

    def ask(self, questions: Sequence[Question], lifetime: int) -> list[Envelope]:
        """Sign one request a question, all on disk in one write; each answers nothing and lives for `lifetime` ms.

        Errors: `envelope.revoked` for a receiver that has no key in force, and those of the memory.
        """
        letters = [self._request(question, lifetime) for question in questions]
        return self._sign(letters)

    def answer(self, request: Taken, body: str, frame: bytes) -> Envelope:
        """Sign the answer to a request, and keep it with the small part of its body; it lives as long as the request.

        Errors: those of the memory.
        """
        asked = request.header
        stream = Stream(self.name, asked.sender, asked.study, "answer")
        lifetime = asked.expires - asked.issued
        letter = Letter(self.federation, stream, asked.round, asked.kind, body, lifetime, request.digest)
        (envelope,) = self._sign([letter])
        self._keep(request, Kept(envelope, frame))
        return envelope

    def take_request(self, envelope: Envelope, sender: str, study: str, kind: str, body: Callable[[], str]) -> Taken:
        """Take a request of this study and kind, for this party, by that sender.

        `body` returns the SHA-256 of what came along; it is asked last. Errors: those of `verify`, `Expected.check`,
        `check_time` and `Receiver.accept`; `envelope.other-body`, `envelope.before-memory`, and those of the memory.
        """
        return self._take(envelope, Expected(self.federation, study, sender, self.name, "request", kind), body)

    def take_answer(self, envelope: Envelope, sender: str, study: str, body: Callable[[], str]) -> Taken:
        """Take a peer's answer to the newest request of this study, of that request's round and kind.

        Errors: as `take_request`, and `envelope.unasked` where nothing was asked.
        """
        asked = Sender.from_bytes(self._nonces.read("sender", Stream(self.name, sender, study, "request"))).newest
        if asked is None:
            raise EnvelopeError("unasked", f"{sender} was asked nothing in this study", hint="ask it first")
        where = (self.federation, study, sender, self.name)
        expected = Expected(*where, "answer", asked.header.kind, asked.header.round, asked.digest)
        return self._take(envelope, expected, body)

    def _request(self, question: Question, lifetime: int) -> Letter:
        if not self.peers.is_active(question.receiver):
            raise EnvelopeError("revoked", f"{question.receiver} has no key in force", hint="leave it out")
        stream = Stream(self.name, question.receiver, question.study, "request")
        return Letter(self.federation, stream, question.round, question.kind, question.body, lifetime)

    def _sign(self, letters: Sequence[Letter]) -> list[Envelope]:
        for _ in range(_TRIES):
            changes, envelopes = [], []
            for letter in letters:
                old = self._nonces.read("sender", letter.stream)
                sender, envelope = Sender.from_bytes(old).sign(letter, self._key, self._clock())
                changes.append(Change("sender", letter.stream, old, sender.to_bytes()))
                envelopes.append(envelope)
            if self._nonces.swap(changes):
                return envelopes
        raise _busy()

    def _take(self, envelope: Envelope, expected: Expected, body: Callable[[], str]) -> Taken:
        header, generation = verify(envelope, self.peers)
        expected.check(header)
        check_time(header, self._clock())
        stream = Stream.of(header)
        found = ""
        for _ in range(_TRIES):
            old = self._nonces.read("receiver", stream)
            if old is None:
                self._require_remembered(header)
            state = Receiver.from_bytes(old).accept(header, envelope.digest, generation)
            found = found or body()
            if found != header.body:
                raise EnvelopeError("other-body", f"the body is not the one that {header.sender} signed", hint=_LOG)
            if self._nonces.swap([Change("receiver", stream, old, state.to_bytes())]):
                return Taken(header, envelope.digest, state.deliveries > 1, state.kept)
        raise _busy()

    def _require_remembered(self, header: Header) -> None:
        """Refuse to begin a stream with a request that a lost memory may have taken; an answer names its request."""
        if header.direction == "request" and header.issued < self._nonces.began:
            hint = "its sender asks anew; if that does not help, compare the clocks of both machines"
            raise EnvelopeError("before-memory", f"{header.sender} signed before this memory began", hint=hint)

    def _keep(self, request: Taken, kept: Kept) -> None:
        stream = Stream.of(request.header)
        for _ in range(_TRIES):
            old = self._nonces.read("receiver", stream)
            state = Receiver.from_bytes(old).answered(request.digest, kept).to_bytes()
            if state == old or self._nonces.swap([Change("receiver", stream, old, state)]):
                return
        raise _busy()


def _busy() -> EnvelopeError:
    hint = "stop the other process that acts for this party"
    return EnvelopeError("busy", "another process keeps changing this party's memory", hint=hint)


_LOG = "it was refused unread; if nobody attacks, look at the transport between the two"
