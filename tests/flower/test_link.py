"""The coordinator's SuperLink as a process of its own, attacked over its two ports."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtune.errors import TransportError
from fedtune.flower.bundle import build
from fedtune.flower.link import LinkSettings
from fedtune.flower.local_gate import HEADER, token
from fedtune.flower.submission import Control
from tests.support.certificates import DAY, Authority, Credential, other_signature
from tests.support.federation import Federation, wait_for

ACTIVATE = "/v1/fleet/activate-node"
HEAD_SECONDS = 0.6


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = Federation.make(tmp_path_factory.mktemp("federation"))
    federation.start_link(
        head_seconds=HEAD_SECONDS, body_grace_seconds=0.5, slowest_bytes_per_second=1e9, max_connections_each=4
    )
    yield federation
    federation.close()


@pytest.fixture(scope="module")
def site(link: Federation) -> Credential:
    return link.authority.site("a")


def context(authority: Authority, shown: Credential | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(authority.file))
    if shown is not None:
        made.load_cert_chain(shown.certificate_file, shown.key_file)
    return made


def client(link: Federation, shown: Credential | None) -> httpx.Client:
    return httpx.Client(
        base_url=f"https://127.0.0.1:{link.ports['public']}", verify=context(link.authority, shown), trust_env=False
    )


@contextlib.contextmanager
def connected(link: Federation, shown: Credential) -> Iterator[ssl.SSLSocket]:
    raw = socket.create_connection(("127.0.0.1", link.ports["public"]), 5)
    with context(link.authority, shown).wrap_socket(raw, server_hostname="127.0.0.1") as connection:
        yield connection


def activation(key: ec.EllipticCurvePrivateKey) -> httpx.Request:
    """Return the first request of a SuperNode, signed now."""
    pem = public_key_to_bytes(key.public_key())
    return signed(ACTIVATE, ActivateNodeRequest(public_key=pem, heartbeat_interval=30), key)


def signed(path: str, body: Any, key: ec.EllipticCurvePrivateKey) -> httpx.Request:
    """Return a request of a SuperNode, signed now."""
    headers = {"content-type": PROTOBUF_MEDIA_TYPE}
    request = httpx.Request("POST", path, content=body.SerializeToString(), headers=headers)
    call = ProtobufRequestContext(path, body, request)
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(call, lambda _: httpx.Response(200))
    return request


def send(http: httpx.Client, request: httpx.Request) -> httpx.Response:
    return http.post(ACTIVATE, content=request.content, headers=request.headers)


@pytest.fixture(scope="module")
def node_key(link: Federation) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP384R1())
    with link.control() as control:
        control.register(key.public_key(), "a")
    return key


def test_a_site_with_a_certificate_and_a_registered_key_comes_in_once(
    link: Federation, site: Credential, node_key: ec.EllipticCurvePrivateKey
) -> None:
    with client(link, site) as http:
        request = activation(node_key)
        assert send(http, request).status_code == 200
        assert send(http, request).status_code == 409
        assert send(http, activation(node_key)).status_code == 412  # Flower's: the node is there already
    assert "gate.replayed" in link.log("link")


def test_flower_itself_takes_a_head_again_and_its_signatures_twin(
    link: Federation, node_key: ec.EllipticCurvePrivateKey
) -> None:
    """The control: behind the gate, on the private port, what the gate refuses goes through."""
    with link.control() as control:
        (node,) = [node.number for node in control.nodes() if node.name == "a"]
    request = signed(
        "/v1/fleet/send-node-heartbeat",
        SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30),
        node_key,
    )
    twin = dict(request.headers) | {"flwr-signature": other_signature(request.headers["flwr-signature"])}
    url = f"http://127.0.0.1:{link.ports['private']}{request.url.path}"
    for headers in (dict(request.headers), dict(request.headers), twin):
        local = headers | {HEADER: token(link.secret)}
        assert httpx.post(url, content=request.content, headers=local, trust_env=False).status_code == 200


def test_a_key_that_is_not_registered_is_refused_by_flower_itself(link: Federation, site: Credential) -> None:
    with client(link, site) as http:
        assert send(http, activation(ec.generate_private_key(ec.SECP384R1()))).status_code >= 400


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/fleet/register-node"]
)
def test_nothing_but_the_fleet_is_on_the_public_port(link: Federation, site: Credential, path: str) -> None:
    with client(link, site) as http:
        assert http.post(path, headers={HEADER: token(link.secret)}).status_code == 404


def test_health_is_there_for_who_shows_a_certificate(link: Federation, site: Credential) -> None:
    with client(link, site) as http:
        assert http.get("/health").status_code == 200


def test_plain_http_is_refused(link: Federation) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{link.ports['public']}/health", trust_env=False)


@pytest.mark.parametrize("who", ["nobody", "foreign", "expired", "server"])
def test_without_a_valid_certificate_of_the_authority_there_is_no_connection(
    link: Federation, who: str, tmp_path: Path
) -> None:
    shown = {
        "nobody": None,
        "foreign": Authority.make(tmp_path / "foreign").site("a"),
        "expired": link.authority.site("expired", ends=-DAY),
        "server": link.server,
    }[who]
    with client(link, shown) as http, pytest.raises(httpx.TransportError):
        http.get("/health")


def test_an_older_tls_is_refused(link: Federation, site: Credential) -> None:
    old = context(link.authority, site)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", link.ports["public"]), 5) as raw:
        old.wrap_socket(raw, server_hostname="127.0.0.1")


def test_a_site_does_not_speak_with_another_coordinator(link: Federation, tmp_path: Path, site: Credential) -> None:
    foreign = Authority.make(tmp_path / "foreign")
    with httpx.Client(verify=context(foreign, site), trust_env=False) as http, pytest.raises(httpx.ConnectError):
        http.get(f"https://127.0.0.1:{link.ports['public']}/health")


def test_a_revoked_certificate_is_refused_on_its_open_connection(link: Federation) -> None:
    leaving = link.authority.site("leaving")
    with client(link, leaving) as http:
        assert http.get("/health").status_code == 200
        (link.folder / "revoked").write_text(f"{leaving.serial}  # leaving\n")
        assert http.get("/health").status_code == 401
    (link.folder / "revoked").write_text("")
    with client(link, leaving) as http:
        assert http.get("/health").status_code == 200


def read_to_end(connection: ssl.SSLSocket) -> bytes:
    received = b""
    with contextlib.suppress(OSError):
        while piece := connection.recv(4096):
            received += piece
    return received


def test_an_oversized_body_is_refused_by_its_head(link: Federation, site: Credential) -> None:
    with connected(link, site) as connection:
        connection.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: c\r\ncontent-length: 99999999\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 413 ")


def head_of(request: httpx.Request, length: bytes) -> bytes:
    lines = [b"%s: %s" % pair for pair in request.headers.raw if pair[0].lower() not in {b"content-length", b"host"}]
    return b"\r\n".join([b"POST " + ACTIVATE.encode() + b" HTTP/1.1", b"host: c", *lines, length, b"", b""])


def test_a_streamed_body_is_cut_where_it_is_too_large(
    link: Federation, site: Credential, node_key: ec.EllipticCurvePrivateKey
) -> None:
    with connected(link, site) as connection:
        connection.sendall(head_of(activation(node_key), b"transfer-encoding: chunked"))
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 64 * 2**20:
                connection.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
                sent += 2**20
        assert sent < 64 * 2**20
    wait_for(lambda: "gate.too-large" in link.log("link"), 5)


def test_a_slow_body_is_cut(link: Federation, site: Credential, node_key: ec.EllipticCurvePrivateKey) -> None:
    with connected(link, site) as connection:
        connection.sendall(head_of(activation(node_key), b"content-length: 1000"))
        with contextlib.suppress(OSError):
            for _ in range(30):
                connection.sendall(b"x")
                time.sleep(0.05)
        received = read_to_end(connection)
    assert b" 408 " in received.split(b"\r\n")[0] or "gate.slow-body" in link.log("link")


@pytest.mark.parametrize("begun", [b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nx-slow: "])
def test_a_slow_head_is_cut(link: Federation, site: Credential, begun: bytes) -> None:
    started = time.monotonic()
    with connected(link, site) as connection:
        connection.settimeout(0.05)
        connection.sendall(begun)
        ended = False
        while not ended and time.monotonic() - started < 10:
            try:
                if begun:
                    connection.sendall(b"x")
                ended = connection.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                ended = True
    assert ended


def test_a_handshake_that_never_ends_is_cut(link: Federation) -> None:
    with socket.create_connection(("127.0.0.1", link.ports["public"]), 10) as raw:
        assert raw.recv(1) == b""


def test_a_large_head_is_refused(link: Federation, site: Credential) -> None:
    with connected(link, site) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: c\r\n" + b"x-more: 12345678\r\n" * 5000 + b"\r\n")
        assert b" 200 " not in read_to_end(connection)


def test_one_site_cannot_take_all_connections(link: Federation, site: Credential) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(link, site)) for _ in range(4)]
        with client(link, site) as http, pytest.raises(httpx.TransportError):
            http.get("/health")
        with client(link, link.authority.site("other")) as http:
            assert http.get("/health").status_code == 200
        assert len(held) == 4


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/get-fab", "/docs"])
@pytest.mark.parametrize("given", [None, "0" * 64])
def test_local_processes_without_the_secret_reach_nothing(link: Federation, path: str, given: str | None) -> None:
    headers = {HEADER: given} if given else {}
    assert (
        httpx.post(f"http://127.0.0.1:{link.ports['private']}{path}", headers=headers, trust_env=False).status_code
        == 401
    )


def test_the_private_port_is_on_loopback_alone(link: Federation) -> None:
    listening = {
        line.split()[1]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == link.ports["private"]
    }
    assert {address.split(":")[0] for address in listening} == {"0100007F"}


def test_runs_and_nodes_are_managed_over_the_control_api(link: Federation) -> None:
    bundle, key = build('{"rounds":1}'), ec.generate_private_key(ec.SECP384R1())
    with link.control() as control:
        number = control.start(bundle)
        facts = control.run(number)
        assert (facts.bundle_sha256, facts.status) == (bundle.sha256, "pending")
        assert facts in control.runs()
        assert control.stop(number)
        assert (control.run(number).status, control.run(number).outcome) == ("finished", "stopped")
        node = control.register(key.public_key(), "b")
        assert "b" in {each.name for each in control.nodes()}
        control.unregister(node)
        assert "b" not in {each.name for each in control.nodes()}


def test_what_flower_refuses_has_a_code(link: Federation, node_key: ec.EllipticCurvePrivateKey) -> None:
    codes = []
    with link.control() as control:
        for ask in (
            lambda: control.register(node_key.public_key(), "again"),
            lambda: control.unregister(1),
            lambda: control.run(1),
            lambda: control.stop(1),
        ):
            with pytest.raises(TransportError) as error:
                ask()
            codes.append(error.value.code)
    assert codes == ["transport.node-exists", "transport.no-node", "transport.no-run", "transport.no-run"]


def test_a_command_with_another_secret_is_told_so(link: Federation) -> None:
    with Control(link.ports["private"], bytes(32)) as control, pytest.raises(TransportError) as error:
        control.runs()
    assert error.value.code == "transport.wrong-secret"


def test_a_command_without_a_coordinator_is_told_so() -> None:
    with Control(1, bytes(32)) as control, pytest.raises(TransportError) as error:
        control.runs()
    assert error.value.code == "transport.not-running"


def test_the_state_is_its_users_alone(link: Federation) -> None:
    state = link.folder / "link"
    assert {path.stat().st_mode & 0o077 for path in state.rglob("*") if path.is_file()} == {0}


@pytest.mark.slow
def test_a_restart_keeps_nodes_and_refuses_what_was_seen_before_it(tmp_path: Path) -> None:
    federation = Federation.make(tmp_path)
    try:
        federation.start_link()
        site, key = federation.authority.site("a"), ec.generate_private_key(ec.SECP384R1())
        with federation.control() as control:
            control.register(key.public_key(), "a")
        captured = activation(key)
        with client(federation, site) as http:
            assert send(http, captured).status_code == 200
        assert federation.end("link") == 0
        assert not (tmp_path / "link.ready").exists()
        federation.start_link()
        with client(federation, site) as http:
            assert send(http, captured).status_code == 409
            assert send(http, activation(key)).status_code == 412  # Flower's: the node is there already
    finally:
        federation.close()


def test_a_port_that_is_taken_is_an_error_with_a_hint(link: Federation, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    settings = json.loads((link.folder / "link.json").read_text())
    file.write_text(json.dumps(settings | {"public_port": link.ports["public"], "ready": str(tmp_path / "ready")}))
    done = subprocess.run(
        [sys.executable, "-m", "fedtune.flower.link", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error[transport.port-in-use]" in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_have_no_unknown_keys() -> None:
    with pytest.raises(ValueError, match="extra"):
        LinkSettings.model_validate({"unknown": 1})
