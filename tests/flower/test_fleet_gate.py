from __future__ import annotations

import asyncio
import base64
import datetime as dt
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, verify_signature
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtune.flower.fleet_gate import PEER, FleetGate, GateLimits
from fedtune.flower.peer import Peer, Revocations, key_digest
from fedtune.flower.replay import ReplayCache
from tests.support.certificates import other_signature

NOW = dt.datetime.now(dt.UTC).timestamp()
PULL = "/v1/fleet/pull-messages"
PEER_OF_A = Peer("fedtune://test.internal/a", "abc123", "0" * 64, NOW + 1000)
KEY = ec.generate_private_key(ec.SECP384R1())

Headers = list[tuple[bytes, bytes]]


@dataclass
class Got:
    """What came back, and what the app behind the gate was given."""

    status: int = 0
    closes: bool = False
    seen: int = 0
    body: bytes | None = None
    read: int = 0


@dataclass
class Behind:
    """Stands for Flower's app."""

    gate: FleetGate
    bodies: list[bytes]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "revoked").write_text("")
    return tmp_path


@pytest.fixture
def make(folder: Path) -> Iterator[Callable[..., Behind]]:
    caches: list[ReplayCache] = []

    def gate(limits: GateLimits | None = None, app: Any = None, **changes: Any) -> Behind:
        bodies: list[bytes] = []

        async def flower(scope: Any, receive: Any, send: Any) -> None:
            bodies.append((await receive())["body"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})

        caches.append(ReplayCache(folder / f"seen{len(caches)}", **changes))
        made = FleetGate(app or flower, caches[-1], limits or GateLimits(), Revocations(folder / "revoked"))
        return Behind(made, bodies)

    yield gate
    for cache in caches:
        cache.close()


def signed(key: ec.EllipticCurvePrivateKey = KEY) -> Headers:
    """Return the headers that Flower's own SuperNode would send now."""
    request = httpx.Request("POST", "https://coordinator.test")
    context = ProtobufRequestContext("/x", SendNodeHeartbeatRequest(), request)
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(context, lambda _: httpx.Response(200))
    return [(name, value) for name, value in request.headers.raw if name.lower().startswith(b"flwr-")]


def ask(
    behind: Behind,
    headers: Headers | None = None,
    *,
    path: str = PULL,
    method: str = "POST",
    query: bytes = b"",
    peer: Peer | None = PEER_OF_A,
    pieces: tuple[bytes, ...] = (b"body",),
    length: bool = True,
    pause: float = 0.0,
) -> Got:
    """Send one request through the gate, as uvicorn would."""
    got = Got()
    size = [(b"content-length", b"%d" % sum(map(len, pieces)))] if length else []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": [(name.lower(), value) for name, value in (signed() if headers is None else headers)] + size,
        "client": ("192.0.2.1", 1234),
        "state": {PEER: peer} if peer else {},
    }
    left = list(pieces)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        got.read += 1
        piece = left.pop(0) if left else b""
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    async def send(event: dict[str, Any]) -> None:
        if event["type"] == "http.response.start":
            got.status = event["status"]
            got.closes = (b"connection", b"close") in event["headers"]

    asyncio.run(behind.gate(scope, receive, send))
    got.seen = len(behind.bodies)
    got.body = behind.bodies[-1] if behind.bodies else None
    return got


def refused(behind: Behind, got: Got, status: int, code: str) -> bool:
    """Whether a request ended at the gate, and for this reason."""
    return (got.status, got.seen, got.closes) == (status, 0, True) and behind.gate.refusals == {f"gate.{code}": 1}


def test_what_a_supernode_asks_goes_through_whole(make: Callable[..., Behind]) -> None:
    got = ask(make(), pieces=(b"first", b"second", b""))
    assert (got.status, got.body) == (200, b"firstsecond")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/register-node"),
        ("POST", "/v1/fleet/unregister-node"),
        ("GET", PULL),
        ("POST", "/v1/fleet/"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "/v1/fleet/pull%2dmessages"),
        ("POST", "//v1/fleet/pull-messages"),
        ("POST", PULL + "/"),
        ("POST", "/health"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/"),
    ],
)
def test_no_other_path_is_there_and_no_body_is_read(make: Callable[..., Behind], method: str, path: str) -> None:
    behind = make()
    got = ask(behind, method=method, path=path)
    assert refused(behind, got, 404, "unknown-path")
    assert got.read == 0


def test_a_query_makes_it_another_path(make: Callable[..., Behind]) -> None:
    behind = make()
    assert refused(behind, ask(behind, query=b"x=1"), 404, "unknown-path")


def test_health_needs_a_certificate_and_no_signature(make: Callable[..., Behind]) -> None:
    assert ask(make(), [], method="GET", path="/health").status == 200
    behind = make()
    assert refused(behind, ask(behind, [], method="GET", path="/health", peer=None), 401, "no-certificate")


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_captured_head_opens_no_other_request(make: Callable[..., Behind], count: int) -> None:
    behind, headers = make(), signed()
    assert ask(behind, headers).status == 200
    others = [PULL, "/v1/fleet/push-object", "/v1/fleet/get-fab"]
    statuses = {ask(behind, headers, path=others[index % 3], pieces=(b"%d" % index,)).status for index in range(count)}
    assert statuses == {409}
    assert len(behind.bodies) == 1
    assert behind.gate.refusals == {"gate.replayed": count}


def twin(headers: Headers) -> Headers:
    """Return the other valid signature (r, n - s) over the same timestamp: nobody needs the key to make it."""
    found = dict(headers)
    signature = other_signature(found[b"flwr-signature"].decode()).encode()
    return list((found | {b"flwr-signature": signature}).items())


def test_the_twin_of_a_signature_is_a_replay_too(make: Callable[..., Behind]) -> None:
    headers = signed()
    other = twin(headers)
    found = dict(other)
    timestamp, signature = found[b"flwr-timestamp"], base64.b64decode(found[b"flwr-signature"])
    assert verify_signature(KEY.public_key(), timestamp, signature)  # the control: Flower would take it
    behind = make()
    assert [ask(behind, headers).status, ask(behind, other).status] == [200, 409]


def test_another_spelling_of_the_key_is_a_replay_too(make: Callable[..., Behind]) -> None:
    headers = dict(signed())
    pem = public_key_to_bytes(KEY.public_key())
    other = headers | {b"flwr-public-key": base64.b64encode(b"remark\n" + pem.replace(b"\n", b"\r\n"))}
    behind = make()
    assert ask(behind, list(headers.items())).status == 200
    assert ask(behind, list(other.items())).status in {401, 409}
    assert len(behind.bodies) == 1


@pytest.mark.parametrize("name", [b"flwr-signature", b"flwr-timestamp", b"flwr-public-key"])
def test_a_header_that_is_there_twice_is_refused(make: Callable[..., Behind], name: bytes) -> None:
    behind, headers = make(), signed()
    doubled = [*headers, (name, dict(signed())[name])]
    assert refused(behind, ask(behind, doubled), 401, "unsigned")


@pytest.mark.parametrize("name", [b"flwr-signature", b"flwr-timestamp", b"flwr-public-key"])
@pytest.mark.parametrize("value", [None, b"", b"AAAA", b"\xff\xfe", b"2026-01-01T00:00:00"])
def test_without_a_valid_signature_no_body_is_read(
    make: Callable[..., Behind], name: bytes, value: bytes | None
) -> None:
    behind = make()
    headers = [(key, old if key != name else value) for key, old in signed() if key != name or value is not None]
    got = ask(behind, [(key, each) for key, each in headers if each is not None])
    assert refused(behind, got, 401, "unsigned")
    assert got.read == 0


def test_a_signature_by_another_key_is_refused(make: Callable[..., Behind]) -> None:
    behind = make()
    other = dict(signed(ec.generate_private_key(ec.SECP384R1())))[b"flwr-public-key"]
    headers = [(key, other if key == b"flwr-public-key" else value) for key, value in signed()]
    assert refused(behind, ask(behind, headers), 401, "unsigned")


def test_a_timestamp_without_a_zone_is_refused_though_it_is_signed(make: Callable[..., Behind]) -> None:
    behind = make()
    found = dict(signed())
    timestamp = b"2026-01-01T00:00:00"
    from flwr.supercore.primitives.asymmetric import sign_message

    found |= {b"flwr-timestamp": timestamp, b"flwr-signature": base64.b64encode(sign_message(KEY, timestamp))}
    assert refused(behind, ask(behind, list(found.items())), 401, "unsigned")


def test_a_revoked_certificate_is_refused_at_once_on_an_open_connection(
    make: Callable[..., Behind], folder: Path
) -> None:
    behind = make()
    assert ask(behind).status == 200
    (folder / "revoked").write_text(f"# by fedtune\n{PEER_OF_A.serial.rjust(40, '0')}  # a\n")
    assert ask(behind).status == 401
    (folder / "revoked").write_text("")
    assert ask(behind).status == 200
    (folder / "revoked").write_text(PEER_OF_A.key)
    assert ask(behind).status == 401
    assert behind.gate.refusals == {"gate.revoked": 2}


def test_a_revoked_node_key_is_refused_under_any_certificate(make: Callable[..., Behind], folder: Path) -> None:
    behind = make()
    (folder / "revoked").write_text(key_digest(KEY.public_key()))
    assert refused(behind, ask(behind, peer=replace(PEER_OF_A, serial="77")), 401, "revoked")
    assert ask(behind, signed(ec.generate_private_key(ec.SECP384R1()))).status == 200


@pytest.mark.parametrize("damage", ["missing", "text", "bytes", "large"])
def test_without_a_readable_list_of_revocations_nobody_comes_in(
    make: Callable[..., Behind], folder: Path, damage: str
) -> None:
    file, behind = folder / "revoked", make()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"text": b"site a", "bytes": b"\xff\xfe", "large": b"ab\n" * 2_000_000}[damage])
    assert refused(behind, ask(behind), 503, "no-revocations")
    file.write_text("")
    assert ask(behind).status == 200


def test_a_certificate_that_runs_out_on_an_open_connection_is_refused(make: Callable[..., Behind]) -> None:
    behind = make()
    assert refused(behind, ask(behind, peer=replace(PEER_OF_A, expires=NOW - 1)), 401, "expired")


def test_a_body_that_says_it_is_too_large_is_not_read(make: Callable[..., Behind]) -> None:
    behind = make(GateLimits(body=10))
    got = ask(behind, pieces=(b"x" * 11,))
    assert refused(behind, got, 413, "too-large")
    assert got.read == 0


def test_a_body_in_pieces_is_cut_where_it_becomes_too_large(make: Callable[..., Behind]) -> None:
    behind = make(GateLimits(body=10))
    got = ask(behind, pieces=(b"x" * 6,) * 5, length=False)
    assert refused(behind, got, 413, "too-large")
    assert got.read == 2


def test_a_body_that_is_longer_than_it_says_is_cut(make: Callable[..., Behind]) -> None:
    behind = make(GateLimits(body=10))
    headers = [*signed(), (b"content-length", b"4")]
    assert refused(behind, ask(behind, headers, pieces=(b"x" * 6,) * 5, length=False), 413, "too-large")


@pytest.mark.parametrize("value", [b"-1", b"1e3", b"", b"0x10", b"+4"])
def test_a_length_that_is_no_number_is_refused(make: Callable[..., Behind], value: bytes) -> None:
    behind = make()
    assert refused(behind, ask(behind, [*signed(), (b"content-length", value)], length=False), 400, "bad-head")


@pytest.mark.parametrize("more", [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")])
def test_a_body_of_two_lengths_is_refused(make: Callable[..., Behind], more: tuple[bytes, bytes]) -> None:
    behind = make()
    assert refused(behind, ask(behind, [*signed(), more]), 400, "bad-head")


def test_a_slow_body_is_cut(make: Callable[..., Behind]) -> None:
    behind = make(GateLimits(grace=0.05, slowest=1e6))
    assert refused(behind, ask(behind, pieces=(b"x",) * 1000, pause=0.01), 408, "slow-body")


def test_a_client_that_hangs_up_in_its_body_costs_nothing(make: Callable[..., Behind]) -> None:
    behind = make()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        """Nobody listens."""

    scope = {
        "type": "http",
        "method": "POST",
        "raw_path": PULL.encode(),
        "query_string": b"",
        "headers": [(name.lower(), value) for name, value in signed()],
        "client": None,
        "state": {PEER: PEER_OF_A},
    }
    asyncio.run(behind.gate(scope, receive, send))  # type: ignore[arg-type]
    assert behind.gate.refusals == {"gate.cut-off": 1}
    assert ask(behind).status == 200


def test_bodies_in_memory_are_bounded_in_sum(make: Callable[..., Behind]) -> None:
    held: list[Got] = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if not held:
            held.append(await asyncio.to_thread(ask, behind, pieces=(b"x" * 600,)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    behind = make(GateLimits(held=1000), slow)
    assert ask(behind, pieces=(b"x" * 600,)).status == 200
    assert held[0].status == 503
    assert behind.gate.refusals == {"gate.busy": 1}
    held.append(Got())
    assert ask(behind, pieces=(b"x" * 600,)).status == 200


def test_who_does_not_take_an_answer_loses_the_connection(make: Callable[..., Behind]) -> None:
    async def stuck(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(10)

    behind = make(GateLimits(answer=0.05), stuck)
    assert refused(behind, ask(behind), 503, "slow-answer")


def test_a_full_memory_of_signatures_refuses(make: Callable[..., Behind]) -> None:
    behind = make(capacity=1)
    assert [ask(behind).status, ask(behind).status] == [200, 503]


def test_a_refusal_is_logged_by_code_and_certificate_and_nothing_that_was_sent(
    make: Callable[..., Behind], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    behind = make()
    ask(
        behind, [*signed(), (b"x-canary", b"CANARY")], path="/CANARY\nforged line", query=b"CANARY", pieces=(b"CANARY",)
    )
    (record,) = [record for record in caplog.records if record.name == "fedtune.gate"]
    assert record.getMessage() == "refused certificate abc123 from 192.0.2.1: gate.unknown-path"
    assert "CANARY" not in caplog.text
