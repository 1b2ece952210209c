"""Liveness and readiness over HTTP on loopback, for systemd, containers and people with curl.

`GET /health` answers 200 as long as the process answers at all; `GET /ready` answers 200 or 503 with the parts that
are and are not ready. Nothing can be changed here, and no other machine can ask. Knows no study.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedtune.errors import FedtuneError, ProcessError

logger = logging.getLogger("fedtune.health")
_LOOPBACK = "127.0.0.1"
_HOSTS = {"127.0.0.1", "localhost"}
_SECONDS = 5  # for a client to say what it wants


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a role can do its work now: its parts and the state of each, and numbers for people (JSON values)."""

    ready: bool
    parts: Mapping[str, str] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def serve(port: int, report: Callable[[], Readiness]) -> Iterator[int]:
    """Answer on 127.0.0.1 while the block runs, and yield the port (0 takes a free one).

    `report` is called in other threads, for several requests at once; if it raises, `/ready` is 503 with a code.
    Error: `process.port-in-use`.
    """
    with _server(port, report) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="health", daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def _server(port: int, report: Callable[[], Readiness]) -> _Server:
    try:
        return _Server((_LOOPBACK, port), report)
    except OSError as error:
        hint = "stop what listens there, or choose another port for health"
        raise ProcessError(
            "port-in-use", f"cannot listen on {_LOOPBACK}:{port}: {error.strerror}", hint=hint
        ) from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that says nothing does not hold up the end

    def __init__(self, address: tuple[str, int], report: Callable[[], Readiness]) -> None:
        self.report = report
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that go away."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SECONDS
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        # A web page that has its own name resolve to loopback does not read here.
        if self.headers.get("host", "localhost").rsplit(":", 1)[0] not in _HOSTS:
            self._send(HTTPStatus.MISDIRECTED_REQUEST, {"code": "process.other-host"})
        elif self.path == "/health":
            self._send(HTTPStatus.OK, {"alive": True})
        elif self.path == "/ready":
            self._send(*_readiness(self.server.report))
        else:
            self._send(HTTPStatus.NOT_FOUND, {"code": "process.unknown-path"})

    def _send(self, status: HTTPStatus, document: Mapping[str, Any]) -> None:
        body = json.dumps(document, default=str).encode() + b"\n"
        self.send_response_only(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("cache-control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's name
        """Say nothing: probes come every few seconds."""


def _readiness(report: Callable[[], Readiness]) -> tuple[HTTPStatus, Mapping[str, Any]]:
    try:
        found = report()
    except Exception as error:
        code = error.code if isinstance(error, FedtuneError) else "process.internal"
        logger.warning("readiness cannot be told", exc_info=error, extra={"code": code})
        return HTTPStatus.SERVICE_UNAVAILABLE, {"ready": False, "code": code}
    status = HTTPStatus.OK if found.ready else HTTPStatus.SERVICE_UNAVAILABLE
    return status, {"ready": found.ready, "parts": dict(found.parts), "detail": dict(found.detail)}
