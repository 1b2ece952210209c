"""The gate before Flower's app on the public port: it lets through what a SuperNode has to ask, once, and nothing else.

In this order, each refusal with a status and a code that is logged without anything of the request's content:

1. the peer's certificate: present, not run out, not revoked (401)
2. the path: `GET /health` and ten paths of the fleet API, spelt exactly (404; no body is read)
3. the head: each of Flower's three signature headers once, the body's length bounded (400, 413)
4. the signature, which covers nothing but a timestamp: valid, and never seen before (401, 409)
5. the body: whole within a time that follows from its length, bounded in sum over all requests (408, 413, 503)

Flower checks the signature again and knows which node may ask for what. Registering nodes, starting runs and everything
else that Flower serves is not reachable here. Knows no TLS and no socket; those limits are `fedtune.flower.listener`'s.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from time import time
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGIReceiveEvent, ASGISendCallable, HTTPScope

from fedtune.errors import TransportError
from fedtune.flower.peer import Peer, Revocations, key_digest
from fedtune.flower.replay import ReplayCache

PEER = "fedtune.peer"  # where a listener puts the Peer of a connection in the state of a request
FLEET_PATHS = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "send-node-heartbeat",
    )
)
_HEADERS = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
_MAX_HEADERS = 48
_REPLAY_STATUS = {"replayed": 409, "stale": 401, "clock-back": 503, "full": 503, "unwritable": 503}
logger = logging.getLogger("fedtune.gate")


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What one request may cost.

    A body of n bytes has `grace + n / slowest` seconds to arrive (a streamed one as if it were of `body` bytes);
    `held` bytes of bodies are kept in memory at a time; `turns` requests are answered at a time, fewer than Flower has
    threads, and an answer has `answer` seconds to be made and taken.
    """

    body: int = 8 * 2**20
    held: int = 256 * 2**20
    grace: float = 10.0
    slowest: float = 64 * 2**10
    turns: int = 32
    answer: float = 120.0


class FleetGate:
    """ASGI middleware; `refusals` counts what was refused by code."""

    def __init__(
        self,
        app: ASGI3Application,
        seen: ReplayCache,
        limits: GateLimits,
        revocations: Revocations | None = None,
        clock: Callable[[], float] = time,
    ) -> None:
        self._app, self._seen, self._limits, self._clock = app, seen, limits, clock
        self._revocations = revocations
        self._held = 0
        self._turns = asyncio.Semaphore(limits.turns)
        self.refusals: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Pass a request on, or refuse it and close its connection."""
        if scope["type"] != "http":
            return
        answer = _Answer(send)
        try:
            await self._serve(scope, receive, answer)
        except _Refused as refused:
            self.refusals[refused.code] += 1
            logger.warning("refused %s: %s", _origin(scope), refused.code)
            if not answer.started:
                await answer.refuse(refused.status)

    async def _serve(self, scope: HTTPScope, receive: ASGIReceiveCallable, answer: _Answer) -> None:
        self._welcome(scope)
        if _route(scope) == "/health":
            await self._pass_on(scope, b"", receive, answer)
            return
        length = _declared_length(scope)
        if length is not None and length > self._limits.body:
            raise _Refused(413, "gate.too-large")
        self._once(scope)
        with self._room(self._limits.body if length is None else length):
            body = await self._body(length, receive)
            await self._pass_on(scope, body, receive, answer)

    def _welcome(self, scope: HTTPScope) -> None:
        peer = scope.get("state", {}).get(PEER)
        if not isinstance(peer, Peer):
            raise _Refused(401, "gate.no-certificate")
        if peer.expires <= self._clock():
            raise _Refused(401, "gate.expired")
        self._not_revoked(peer.serial, peer.key)

    def _not_revoked(self, *identifiers: str) -> None:
        try:
            revoked = self._revocations is not None and self._revocations.any_of(*identifiers)
        except TransportError as error:
            raise _Refused(503, "gate.no-revocations") from error
        if revoked:
            raise _Refused(401, "gate.revoked")

    def _once(self, scope: HTTPScope) -> None:
        """Admit a signature that is valid for the first time.

        What is remembered is the key and what it signed, not the signature: each ECDSA signature has a twin that is
        valid too, and base64 has several spellings of the same bytes.
        """
        key, timestamp = _signed(scope)
        self._not_revoked(key)
        verdict = self._seen.admit(f"{key} {timestamp}".encode(), _seconds(timestamp))
        if verdict != "new":
            raise _Refused(_REPLAY_STATUS[verdict], f"gate.{verdict}")

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        if self._held + size > self._limits.held:
            raise _Refused(503, "gate.busy")
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    async def _body(self, length: int | None, receive: ASGIReceiveCallable) -> bytes:
        expected = self._limits.body if length is None else length
        try:
            async with asyncio.timeout(self._limits.grace + expected / self._limits.slowest):
                return await _whole_body(receive, self._limits.body)
        except TimeoutError as error:
            raise _Refused(408, "gate.slow-body") from error

    async def _pass_on(self, scope: HTTPScope, body: bytes, receive: ASGIReceiveCallable, answer: _Answer) -> None:
        """Let Flower answer; whoever does not take an answer in time loses the connection."""
        try:
            async with asyncio.timeout(self._limits.answer), self._turns:
                await self._app(scope, _replaying(body, receive), answer)
        except TimeoutError as error:
            raise _Refused(503, "gate.slow-answer") from error


class _Refused(Exception):  # noqa: N818 - control flow inside this module
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Answer:
    """Sends what the app answers, and knows whether it has begun to."""

    def __init__(self, send: ASGISendCallable) -> None:
        self._send = send
        self.started = False

    async def __call__(self, event: Any) -> None:
        self.started = True
        await self._send(event)

    async def refuse(self, status: int) -> None:
        """Answer with a status and nothing else; the rest of the request is never read."""
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await self({"type": "http.response.start", "status": status, "headers": headers, "trailers": False})
        await self({"type": "http.response.body", "body": b"", "more_body": False})


def _route(scope: HTTPScope) -> str:
    path = scope["raw_path"]
    if not scope["query_string"]:
        if scope["method"] == "GET" and path == b"/health":
            return "/health"
        if scope["method"] == "POST" and path in FLEET_PATHS:
            return path.decode()
    raise _Refused(404, "gate.unknown-path")


def _declared_length(scope: HTTPScope) -> int | None:
    """Return the length that the head declares, None for a body in chunks."""
    headers = list(scope["headers"])
    if len(headers) > _MAX_HEADERS:
        raise _Refused(400, "gate.bad-head")
    lengths = [value for name, value in headers if name == b"content-length"]
    if not lengths:
        return None
    in_chunks = any(name == b"transfer-encoding" for name, _ in headers)
    if len(lengths) > 1 or in_chunks or not lengths[0].isdigit():
        raise _Refused(400, "gate.bad-head")
    return int(lengths[0])


def _signed(scope: HTTPScope) -> tuple[str, str]:
    """Return the digest of a node's key and the timestamp that the key has validly signed."""
    try:
        key, signature, timestamp = (_only(scope, name) for name in _HEADERS)
        text = timestamp.decode("ascii")
        public_key, digest = _public_key(b64decode(key, validate=True))
        if verify_signature(public_key, timestamp, b64decode(signature, validate=True)):
            return digest, text
    except (ValueError, TypeError, AttributeError, binascii.Error):
        pass
    raise _Refused(401, "gate.unsigned")


def _only(scope: HTTPScope, name: str) -> bytes:
    """Return a header that is there once: of two, Flower would read one and this gate perhaps the other."""
    wanted = name.encode()
    (value,) = [value for key, value in scope["headers"] if key == wanted]
    return value


@lru_cache(maxsize=256)
def _public_key(pem: bytes) -> tuple[EllipticCurvePublicKey, str]:
    key = bytes_to_public_key(pem)
    return key, key_digest(key)


def _seconds(timestamp: str) -> float:
    try:
        moment = datetime.fromisoformat(timestamp)
    except ValueError:
        moment = datetime.min  # noqa: DTZ901 - has no zone, so it is refused below
    if moment.tzinfo is None:
        raise _Refused(401, "gate.unsigned")
    return moment.timestamp()


async def _whole_body(receive: ASGIReceiveCallable, limit: int) -> bytes:
    body = bytearray()
    while True:
        event = await receive()
        if event["type"] != "http.request":
            raise _Refused(400, "gate.cut-off")
        body += event.get("body", b"")
        if len(body) > limit:
            raise _Refused(413, "gate.too-large")
        if not event.get("more_body", False):
            return bytes(body)


def _replaying(body: bytes, receive: ASGIReceiveCallable) -> ASGIReceiveCallable:
    """Return a `receive` that gives the body first and then whatever the connection says."""
    events: list[ASGIReceiveEvent] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_event() -> ASGIReceiveEvent:
        return events.pop() if events else await receive()

    return next_event


def _origin(scope: HTTPScope) -> str:
    """Say where a request comes from: its certificate's serial number and its address; nothing of what it says."""
    peer, client = scope.get("state", {}).get(PEER), scope.get("client")
    who = f"certificate {peer.serial}" if isinstance(peer, Peer) else "no certificate"
    return f"{who} from {client[0] if client else 'nowhere'}"
