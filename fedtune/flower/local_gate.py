"""The gate on loopback: only processes that hold the machine's secret reach Flower's control and runtime APIs.

Flower's control API has no log-in, and of its runtime API only the claim of a task asks for the secret; whoever has an
account on the machine could register nodes and start runs. Here every request needs a token that is made from the
secret. It is sent in the clear: loopback is read by root alone, who reads the secret as well. Knows no TLS.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path
from typing import Any

import httpx
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable

from fedtune.errors import TransportError
from fedtune.run.private_files import PrivateFiles

HEADER = "fedtune-local"
_LABEL = b"fedtune local api v1"
_MIN_SECRET = 32
logger = logging.getLogger("fedtune.gate")


def make_secret(path: Path) -> None:
    """Write a new secret of 32 bytes that only this user can read, unless there is one."""
    if not path.exists():
        PrivateFiles(TransportError, one_writer=True).write(path, [os.urandom(_MIN_SECRET)])


def read_secret(path: Path) -> bytes:
    """Read the machine's secret. Errors: `transport.no-secret`, `transport.open-secret` when others can read it."""
    try:
        mode, secret = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise TransportError("no-secret", f"{path} cannot be read", hint="make it anew and restart") from error
    if mode & 0o077:
        raise TransportError("open-secret", f"{path} can be read by others", hint=f"chmod 600 {path}")
    if len(secret) < _MIN_SECRET:
        raise TransportError("no-secret", f"{path} holds fewer than {_MIN_SECRET} bytes", hint="make it anew")
    return secret


def token(secret: bytes) -> str:
    """Return what a local request has to carry."""
    return hmac.new(secret, _LABEL, hashlib.sha256).hexdigest()


class LocalGate:
    """ASGI middleware that refuses (401) every request without the token, but for `/health`."""

    def __init__(self, app: ASGI3Application, secret: bytes) -> None:
        self._app, self._token = app, token(secret).encode()

    async def __call__(self, scope: Any, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Pass on the app's own life and requests that carry the token."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._knows(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            logger.warning("refused a local request: gate.no-token")
            headers = [(b"content-length", b"0"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 401, "headers": headers, "trailers": False})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _knows(self, scope: Any) -> bool:
        if scope["path"] == "/health":
            return True
        given = [value for name, value in scope["headers"] if name == HEADER.encode()]
        return len(given) == 1 and hmac.compare_digest(given[0], self._token)


class LocalToken:
    """Puts the token on the requests of a Flower client."""

    def __init__(self, secret: bytes) -> None:
        self._token = token(secret)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the header before a request is sent."""
        add_headers(context.request, {HEADER: self._token})
        return call_next(context)
