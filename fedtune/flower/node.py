"""A site's SuperNode: it shows the site's certificate to the coordinator and hands messages to the site's executor.

    python -m fedtune.flower.node SETTINGS.json

It asks the coordinator and is never called: the site opens no port to the outside. Its runtime API is on loopback, for
processes that hold the machine's secret. It runs no app, unpacks no bundle and takes no answer larger than any that a
coordinator has to give. Once it listens on loopback, `ready` holds {"pid", "runtime"}. Knows no study and no record.

Flower's SuperNode has no client certificates; they are given to it by putting a client of ours in the place of its own
(see tests/contract/test_flower_transport.py).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from fedtune.config.schema import Section
from fedtune.errors import BundleError, TransportError
from fedtune.flower import program
from fedtune.flower.environment import enter, hold, log_plainly
from fedtune.flower.memory import forget_the_start, keep_large_blocks_apart
from fedtune.run.files import write_whole

if TYPE_CHECKING:
    import httpx
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from flwr.supercore.run import Run
    from flwr.supernode.nodestate import NodeStateFactory
    from uvicorn import Server

logger = logging.getLogger("fedtune.node")
_LOOPBACK = "127.0.0.1"
_MAX_ANSWER = 16 * 2**20  # Flower's arrays travel in pieces of 5 MiB, a bundle has at most 10 MB
_GRACE = 3
_OFFLINE = 5.0  # seconds; longer than a coordinator waits between two looks for replies


class NodeSettings(Section):
    """Which coordinator a SuperNode connects to (`host:port`) and with what; port 0 takes a free one.

    `node_key` is the ECDSA key that the coordinator has registered (OpenSSH or PKCS #8), `certificate` and `key` are
    what TLS shows. `secret` is shared with this machine's executor. It asks for work every `poll` seconds, which adds
    half of that to a message's way (Flower's own SuperNode: 3 seconds).
    """

    state: Path
    coordinator: str
    authority: Path
    certificate: Path
    key: Path
    node_key: Path
    secret: Path
    ready: Path
    runtime_port: int = Field(9094, ge=0, lt=2**16)
    poll: float = Field(1.0, gt=0, le=30)


def serve(settings: NodeSettings) -> None:
    """Connect and serve until a signal ends it (SystemExit). Errors: `transport.*` for files and ports."""
    keep_large_blocks_apart()
    enter(settings.state / "flower")
    log_plainly()
    from flwr.supernode import fleet_http_connection, start_client_internal

    from fedtune.flower.listener import client_context
    from fedtune.flower.local_gate import read_secret

    hold(settings.state)
    settings.ready.unlink(missing_ok=True)
    key = read_node_key(settings.node_key)
    tls = client_context(settings.certificate, settings.key, settings.authority)
    # Flower looks these names up in its modules when it uses them.
    vars(fleet_http_connection)["FleetHttpClient"] = _client_class(tls, settings.state / "node.number")
    vars(start_client_internal)["get_fused_config_from_fab"] = run_config
    with _listening(settings.runtime_port) as listener:
        _run(settings, key, read_secret(settings.secret), listener)


def _run(settings: NodeSettings, key: EllipticCurvePrivateKey, secret: bytes, listener: socket.socket) -> None:
    from flwr.common.constant import ISOLATION_MODE_PROCESS
    from flwr.supercore.exit import add_exit_handler
    from flwr.supernode import start_client_internal

    from fedtune.flower.node_state import AnsweringStates, sends_what_waits

    states = AnsweringStates()
    wait = states.state().wait
    names = vars(start_client_internal)
    names["_pull_and_store_message"] = sends_what_waits(names["_pull_and_store_message"], states.state())
    names["time"] = SimpleNamespace(sleep=lambda wish: wait(min(wish, settings.poll)))
    server = runtime_server(states, secret)
    thread = threading.Thread(target=server.run, args=([listener],), name="runtime-api", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    if not server.started:
        raise TransportError("not-started", "the runtime API did not start", hint="its log says why")
    add_exit_handler(lambda: _stop(server, thread, settings.ready))
    forget_the_start()
    port = listener.getsockname()[1]
    write_whole(settings.ready, json.dumps({"pid": os.getpid(), "runtime": port}).encode() + b"\n")
    logger.info("runtime API on port %d; connecting to %s", port, settings.coordinator)
    try:
        start_client_internal.start_client_internal(
            state_factory=states,
            server_address=settings.coordinator,
            node_config={},
            root_certificates=settings.authority.read_bytes(),
            insecure=False,
            authentication_keys=(key, key.public_key()),
            isolation=ISOLATION_MODE_PROCESS,
            runtime_api_address=f"{_LOOPBACK}:{port}",
            superexec_auth_secret=secret,
            runtime_dependency_install=False,
        )
    finally:
        _stop(server, thread, settings.ready)


def run_config(content: bytes | Path, _run: Run) -> dict[str, Any]:
    """Return a bundle's plan as Flower wants it, or nothing; the executor refuses what is not exactly a plan's bundle.

    Flower's own function unpacks as much as a bundle says it holds, and an error here would end the SuperNode.
    """
    from fedtune.config.plan import PLAN_KEY
    from fedtune.flower.bundle import read

    try:
        return {PLAN_KEY: read(content if isinstance(content, bytes) else content.read_bytes()).plan}
    except BundleError as error:
        logger.warning("a bundle is refused: %s", error.code)
        return {}


def _client_class(tls: ssl.SSLContext, number_file: Path) -> type:
    """Return Flower's client of the fleet API with a certificate to show, a limit on answers and a second life."""
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, DeactivateNodeRequest
    from flwr.proto.message_pb2 import (
        ConfirmMessageReceivedRequest,
        ConfirmMessageReceivedResponse,
        PullObjectRequest,
        PullObjectResponse,
    )
    from flwr.supercore.protobuf.client import ProtobufClientInterceptor
    from flwr.supercore.retry import RetryInvoker
    from flwr.supernode.fleet_http_client import FleetHttpClient

    class _Client(FleetHttpClient):
        @classmethod
        def from_server_address(
            cls,
            server_address: str,
            insecure: bool,
            root_certificates: bytes | str | None,  # noqa: ARG003 - the context trusts the same file
            interceptors: Sequence[ProtobufClientInterceptor],
            *,
            retry_invoker: RetryInvoker | None = None,
        ) -> Self:
            if insecure:
                raise TransportError("no-certificate", "a SuperNode connects by TLS and not otherwise")
            made = cls(f"https://{server_address}", interceptors=interceptors, verify=tls, retry_invoker=retry_invoker)
            made._client.event_hooks["response"].append(refuse_large)
            made._client.headers["accept-encoding"] = "identity"
            made._client.follow_redirects = False
            return made

        def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:  # noqa: N802 - Flower's name
            """Connect. After a kill, Flower would refuse that until the dead process's minute is over.

            The node is then taken off line for long enough that the coordinator hears of the message that was lost.
            """
            try:
                answer = super().ActivateNode(request)
            except httpx.HTTPStatusError as error:
                if error.response.status_code == httpx.codes.UNAUTHORIZED or not number_file.exists():
                    raise
                self.DeactivateNode(DeactivateNodeRequest(node_id=int(number_file.read_bytes())))
                time.sleep(_OFFLINE)
                answer = super().ActivateNode(request)
            write_whole(number_file, str(answer.node_id).encode())
            return answer

        def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802 - Flower's name
            """Fetch a part of a message."""
            with _run_goes_on():
                return super().PullObject(request)

        def ConfirmMessageReceived(  # noqa: N802 - Flower's name
            self, request: ConfirmMessageReceivedRequest
        ) -> ConfirmMessageReceivedResponse:
            """Say that a message is here."""
            with _run_goes_on():
                return super().ConfirmMessageReceived(request)

    return _Client


@contextmanager
def _run_goes_on() -> Iterator[None]:
    """Raise an ordinary error where a run ends while its message is fetched.

    Flower's own is none that its SuperNode cleans up after: the message's task would stay behind for an executor to
    claim, without the objects that it then waits for.
    """
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.FORBIDDEN:
            raise
        raise TransportError("run-finished", "the run ended while its message was fetched") from error


def refuse_large(response: httpx.Response) -> None:
    """Refuse an answer before its body is read: one larger than any that is due, compressed, or of no known length."""
    import httpx

    length = response.headers.get("content-length", "")
    if "content-encoding" in response.headers or not length.isdecimal() or int(length) > _MAX_ANSWER:
        raise httpx.RemoteProtocolError("the coordinator's answer is too large or has no length")


def read_node_key(path: Path) -> EllipticCurvePrivateKey:
    """Read a node's private key. Error: `transport.no-node-key`."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    try:
        raw = path.read_bytes()
        load = load_ssh_private_key if b"OPENSSH" in raw[:64] else load_pem_private_key
        key = load(raw, password=None)
    except (OSError, ValueError, TypeError) as error:
        raise TransportError("no-node-key", f"{path} cannot be read as a private key", hint="enrol again") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise TransportError("no-node-key", f"{path} is not an ECDSA key", hint="enrol again")
    return key


def runtime_server(states: NodeStateFactory, secret: bytes) -> Server:
    """Return the server of the runtime API on loopback: Flower's app behind the gate for local processes."""
    from flwr.supernode.main import create_app
    from uvicorn import Config, Server

    from fedtune.flower.local_gate import LocalGate

    app: Any = create_app(state_factory=states, superexec_auth_secret=secret)
    return Server(
        Config(
            LocalGate(app, secret),
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
            ws="none",
        )
    )


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((_LOOPBACK, port), backlog=128)
    except OSError as error:
        hint = "stop what listens there, or choose another port"
        raise TransportError("port-in-use", f"cannot listen on port {port}: {error.strerror}", hint=hint) from error


def _stop(server: Server, thread: threading.Thread, ready: Path) -> None:
    ready.unlink(missing_ok=True)
    server.should_exit = True
    thread.join(_GRACE)


def main(words: list[str]) -> int:
    """Serve by a settings file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return program.run(NodeSettings, serve, words, role="node")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
