"""The public listener's TLS and its limits on connections: what the gate cannot see because no request is whole yet.

Every peer shows a certificate of the federation's authority, each connection anew (no session is resumed). A handshake,
the head of a request and the silence between two requests have a time; the number of connections is bounded, in all and
for each certificate. Knows no path and no signature; those are `fedtune.flower.fleet_gate`'s.

uvicorn gives an app no certificate of its peer and sets no time for a request's head: both are added to its protocol
here (see tests/contract/test_flower_transport.py).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from asyncio import AbstractEventLoop, Transport
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fedtune.errors import TransportError
from fedtune.flower.fleet_gate import PEER
from fedtune.flower.peer import Peer

logger = logging.getLogger("fedtune.gate")


@dataclass(frozen=True, slots=True)
class ListenerLimits:
    """Bounds on connections; times in seconds, `head_bytes` for the request line and all headers together."""

    connections: int = 256
    connections_each: int = 16
    handshake: float = 10.0
    head: float = 10.0
    head_bytes: int = 16 * 2**10
    idle: float = 10.0


def server_context(certificate: Path, key: Path, client_authority: Path) -> ssl.SSLContext:
    """Return a TLS 1.3 context that serves a certificate and asks every peer for one of the authority's.

    Error: `transport.no-certificate` when one of the files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # a resumed session would not show its certificate again
    return _loaded(context, certificate, key, client_authority)


def client_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """Return a TLS 1.3 context that shows a certificate and trusts the federation's authority and no other.

    Error: `transport.no-certificate` when one of the files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return _loaded(context, certificate, key, authority)


def _loaded(context: ssl.SSLContext, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    try:
        # Without a password function, OpenSSL would ask a terminal for that of an encrypted key.
        context.load_cert_chain(certificate, key, password=lambda: b"")
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        named = f"{certificate}, {key} and {authority}"
        hint = "they are PEM files; the key is not encrypted and belongs to the certificate"
        raise TransportError("no-certificate", f"TLS cannot be set up from {named}", hint=hint) from error
    return context


class PatientLoop(asyncio.SelectorEventLoop):
    """An event loop whose servers give a TLS handshake a time of their own; asyncio's is a minute."""

    def __init__(self, handshake: float) -> None:
        super().__init__()
        self._handshake = handshake

    async def create_server(self, *args: Any, **kwargs: Any) -> asyncio.Server:
        """Create a server as asyncio does."""
        if kwargs.get("ssl") is not None:
            kwargs["ssl_handshake_timeout"] = self._handshake
        return await super().create_server(*args, **kwargs)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol that knows its peer's certificate and gives a request's head a time."""

    limits = ListenerLimits()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.peer: Peer | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Note who is there; one connection too many is dropped before a byte of it is read."""
        super().connection_made(transport)
        self.peer = _peer_of(transport)
        self.app_state = {**self.app_state, PEER: self.peer}
        self._watch()
        if self._too_many():
            logger.warning("dropped a connection: gate.too-many-connections")
            transport.abort()

    def handle_events(self) -> None:
        """Handle what has arrived; a head that is whole has no time limit any more."""
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request, for a time."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.head, self._give_up)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            logger.info("closed a silent connection")
            self.transport.abort()

    def _too_many(self) -> bool:
        if len(self.connections) > self.limits.connections:
            return True
        peers = [other.peer for other in self.connections if isinstance(other, GuardedProtocol)]
        return peers.count(self.peer) > self.limits.connections_each


def guarded(limits: ListenerLimits) -> type[GuardedProtocol]:
    """Return the protocol with these limits."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits})


def _peer_of(transport: Transport) -> Peer | None:
    connection = cast(ssl.SSLObject | None, transport.get_extra_info("ssl_object"))
    der = connection.getpeercert(binary_form=True) if connection is not None else None
    return Peer.from_der(der) if der else None
