"""Messages in signed envelopes: a record more, `envelope`, beside those that it signs.

What comes out of `open_request` and `open_answer` was signed by its peer for this party, study and moment, is whole,
and was written down as taken; nothing is decoded before. The arrays stay where they are: they are hashed, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from flwr.app import ConfigRecord, RecordDict

from fedtune.envelopes.endpoint import Endpoint, Question, Taken
from fedtune.envelopes.envelope import Envelope, Header
from fedtune.errors import EnvelopeError
from fedtune.flower.body import Digests, body_digest, frame, in_order, refill

ENVELOPE = "envelope"
_FRAME_LIMIT = 1_000_000  # bytes of an answer's small part that are kept; no reply of ours has a tenth of it
_HEADER_LIMIT = 2_000


@dataclass(frozen=True, slots=True)
class Opened:
    """A message that may be decoded and acted on, without its envelope."""

    content: RecordDict
    taken: Taken

    @property
    def header(self) -> Header:
        """What its sender has signed."""
        return self.taken.header


def seal_requests(
    endpoint: Endpoint, where: tuple[str, int, str], contents: Mapping[str, RecordDict], lifetime: float
) -> dict[str, RecordDict]:
    """Return one request a site in its envelope; `where` is the study, the round and the kind, `lifetime` in seconds.

    Arrays that the contents share are hashed once. Errors: those of `Endpoint.ask`.
    """
    digests = Digests()
    questions = [Question(site, *where, digests.of(content)) for site, content in contents.items()]
    envelopes = endpoint.ask(questions, int(lifetime * 1000))
    return {site: _sealed(contents[site], envelope) for site, envelope in zip(contents, envelopes, strict=True)}


def open_request(endpoint: Endpoint, content: RecordDict, sender: str, study: str, kind: str) -> Opened:
    """Take a request of that sender, study and kind; as `Endpoint.take_request`.

    A request that comes again (`taken.again`) is answered like any other: `seal_answer` finds the kept answer. Errors:
    `envelope.missing`, `envelope.bad-body`, `envelope.contradiction`, and those of `Endpoint.take_request`.
    """
    envelope, body = _split(content)
    return _opened(endpoint.take_request(envelope, sender, study, kind, partial(body_digest, body)), body)


def seal_answer(endpoint: Endpoint, request: Opened, reply: RecordDict) -> RecordDict:
    """Return the answer to a request in its envelope.

    Where the request came again and its answer was kept, that answer is returned byte for byte, if `reply` has its
    arrays; otherwise the reply is signed as a new answer, which its receiver takes only if it has not got the other.
    """
    kept = request.taken.kept
    if kept is not None:
        before = refill(kept.frame, reply)
        if body_digest(before) == kept.envelope.header.body:
            return _sealed(before, kept.envelope)
    small = frame(reply)
    envelope = endpoint.answer(request.taken, body_digest(reply), small if len(small) <= _FRAME_LIMIT else b"")
    return _sealed(reply, envelope)


def open_answer(endpoint: Endpoint, content: RecordDict, sender: str, study: str) -> Opened:
    """Take a site's answer to the newest request; as `open_request` and `Endpoint.take_answer`."""
    envelope, body = _split(content)
    return _opened(endpoint.take_answer(envelope, sender, study, partial(body_digest, body)), body)


def _sealed(content: RecordDict, envelope: Envelope) -> RecordDict:
    if ENVELOPE in content:
        raise ValueError("the message is in an envelope already")
    record = ConfigRecord({"header": envelope.raw, "signature": envelope.signature})
    return RecordDict({ENVELOPE: record, **content})


def _split(content: RecordDict) -> tuple[Envelope, RecordDict]:
    record = content.get(ENVELOPE)
    if not isinstance(record, ConfigRecord) or set(record) != {"header", "signature"}:
        raise EnvelopeError("missing", "the message has no envelope", hint="nobody may speak without one")
    raw, signature = record["header"], record["signature"]
    if not isinstance(raw, bytes) or not isinstance(signature, bytes) or len(raw) > _HEADER_LIMIT:
        raise EnvelopeError("missing", "the message's envelope has no header and signature", hint="upgrade its sender")
    return Envelope(raw, signature), RecordDict({name: kept for name, kept in content.items() if name != ENVELOPE})


def _opened(taken: Taken, body: RecordDict) -> Opened:
    """Refuse a body that says something else than its header of what both name."""
    inner, header = body.get("fedtune"), taken.header
    said = inner if isinstance(inner, ConfigRecord) else {}
    for field, signed in (("plan_sha256", header.study), ("round", header.round), ("site", header.sender)):
        if field in said and said[field] != signed:
            hint = f"{header.sender} contradicts itself: upgrade it"
            raise EnvelopeError("contradiction", f"a body names another {field} than its header", hint=hint)
    return Opened(in_order(body), taken)
