"""Something that answers `GET /health` by TLS as a coordinator does, with a clock and a status that a test sets."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedtune.flower.listener import server_context
from fedtune.pki.authority import COORDINATOR_FILE, Authority, write_coordinator
from fedtune.pki.certificates import pem
from tests.support.enrolments import Coordinator


@dataclass
class Answering:
    """Where it answers; `ahead` is how many seconds its clock is ahead, `paths` what was asked for."""

    port: int
    paths: list[str]
    ahead: float = 0.0
    status: int = 200

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextmanager
def answering(coordinator: Coordinator, folder: Path, own: Authority | None = None) -> Iterator[Answering]:
    """Answer as a coordinator with a certificate of its authority, or of another one of its `own`."""
    folder.mkdir()
    (folder / "ca.pem").write_text(pem(coordinator.authority.certificate))
    write_coordinator(folder, own or coordinator.authority, ["127.0.0.1", "localhost"], coordinator.now())
    tls = server_context(folder / COORDINATOR_FILE, folder / COORDINATOR_FILE, folder / "ca.pem")
    with _Server(tls) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server.told
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.told = Answering(self.server_address[1], [])

    def handle_error(self, *_: Any) -> None:
        """Say nothing of handshakes that fail: tests want them to."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.told.paths.append(self.path)
        self.send_response_only(self.server.told.status)
        self.send_header("date", self.date_time_string(time.time() + self.server.told.ahead))
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
