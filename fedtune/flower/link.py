"""The coordinator's SuperLink: one process, one database, two listeners.

The public one speaks TLS, asks for client certificates and serves what a SuperNode needs (`fedtune.flower.fleet_gate`);
the private one, on loopback, serves everything to processes that hold the machine's secret
(`fedtune.flower.local_gate`). Both have the same Flower app behind them. Nothing runs apps here: that is
`fedtune.flower.executor` in a process of its own.

    python -m fedtune.flower.link SETTINGS.json

Once both listen, `ready` holds {"pid", "private", "public"} (ports); SIGTERM or SIGINT ends it within seconds. Knows no
study and no plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedtune.config.schema import Section
from fedtune.errors import TransportError
from fedtune.flower import program
from fedtune.flower.environment import enter, log_plainly
from fedtune.flower.memory import forget_the_start, keep_large_blocks_apart
from fedtune.run.files import write_whole

if TYPE_CHECKING:
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from uvicorn import Server

logger = logging.getLogger("fedtune.link")
_LOOPBACK = "127.0.0.1"
_GRACE = 5  # seconds for requests that are being answered when the process has to end


class LinkSettings(Section):
    """Where a SuperLink keeps its state and listens; port 0 takes a free one, which `ready` then tells.

    `state` holds Flower's database and the memory of seen signatures: keep it through restarts. `secret` is shared with
    this machine's executors and commands. `revoked` is a file as `fedtune.flower.peer.Revocations` reads it.
    """

    state: Path
    certificate: Path
    key: Path
    client_authority: Path
    secret: Path
    ready: Path
    revoked: Path | None = None
    public_host: str = "0.0.0.0"  # noqa: S104 - sites are on other machines
    public_port: int = Field(8443, ge=0, lt=2**16)
    private_port: int = Field(8000, ge=0, lt=2**16)
    max_body: int = Field(8 * 2**20, ge=2**10)
    max_held: int = Field(256 * 2**20, ge=2**20)
    max_connections: int = Field(256, ge=1)
    max_connections_each: int = Field(16, ge=1)
    max_seen: int = Field(200_000, ge=1)
    head_seconds: float = Field(10.0, gt=0)
    body_grace_seconds: float = Field(10.0, gt=0)
    slowest_bytes_per_second: float = Field(65_536, gt=0)
    tidy_seconds: float = Field(60.0, gt=0)

    @property
    def database(self) -> Path:
        """Flower's state: registered nodes, runs, and messages on their way."""
        return self.state / "link.db"

    @property
    def seen(self) -> Path:
        """The folder of `fedtune.flower.replay`."""
        return self.state / "seen"


def serve(settings: LinkSettings) -> None:
    """Serve until a signal ends it. Errors: `transport.*` for files, ports and folders that cannot be used."""
    from fedtune.flower.listener import PatientLoop

    keep_large_blocks_apart()
    enter(settings.state / "flower")
    log_plainly()
    settings.ready.unlink(missing_ok=True)
    with asyncio.Runner(loop_factory=lambda: PatientLoop(settings.head_seconds)) as runner:
        runner.run(_serve(settings))


async def _serve(settings: LinkSettings) -> None:
    from fedtune.flower.local_gate import read_secret

    with (
        _listening(settings.public_host, settings.public_port) as public,
        _listening(_LOOPBACK, settings.private_port) as private,
    ):
        secret = read_secret(settings.secret)
        app = _app(settings, secret)
        inside, outside = _servers(settings, app, secret)
        _stop_on_signal(inside, outside)
        private_life = asyncio.create_task(inside.serve([private]))
        await _until_started(inside, private_life)
        public_life = asyncio.create_task(outside.serve([public]))
        await _until_started(outside, public_life)
        forget_the_start()
        keeping = asyncio.create_task(_keep_house(settings, app))
        _tell(settings.ready, public.getsockname()[1], private.getsockname()[1])
        await public_life
        keeping.cancel()
        inside.should_exit = True  # the database closes last
        await private_life
    settings.ready.unlink(missing_ok=True)


def _app(settings: LinkSettings, secret: bytes) -> Any:
    """Return Flower's app."""
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.main import create_app

    from fedtune.flower import database, object_files

    database.prepare()
    object_files.prepare()
    return create_app(flower_config(settings, secret), SuperLinkLifespan)


async def _keep_house(settings: LinkSettings, app: Any) -> None:
    """Tidy the database now and then, beside everything else."""
    from fedtune.flower.housekeeping import Housekeeper

    housekeeper = Housekeeper(app.state.linkstate_factory.state(), settings.database)
    while True:
        await asyncio.to_thread(housekeeper.tidy)
        await asyncio.sleep(settings.tidy_seconds)


def _servers(settings: LinkSettings, app: Any, secret: bytes) -> tuple[Server, Server]:
    """Return the private server, which owns the app's life, and the public one."""
    from uvicorn import Config, Server

    from fedtune.flower.fleet_gate import FleetGate, GateLimits
    from fedtune.flower.listener import ListenerLimits, guarded, server_context
    from fedtune.flower.local_gate import LocalGate
    from fedtune.flower.peer import Revocations
    from fedtune.flower.replay import ReplayCache

    class _Server(Server):
        """A server that leaves signals to this module: two of them share the process."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    tls = server_context(settings.certificate, settings.key, settings.client_authority)
    limits = GateLimits(
        body=settings.max_body,
        held=settings.max_held,
        grace=settings.body_grace_seconds,
        slowest=settings.slowest_bytes_per_second,
    )
    revocations = Revocations(settings.revoked) if settings.revoked is not None else None
    gate = FleetGate(app, ReplayCache(settings.seen, capacity=settings.max_seen), limits, revocations)
    bounds = ListenerLimits(
        connections=settings.max_connections,
        connections_each=settings.max_connections_each,
        head=settings.head_seconds,
    )
    common: dict[str, Any] = {
        "access_log": False,
        "log_config": None,
        "proxy_headers": False,
        "server_header": False,
        "timeout_graceful_shutdown": _GRACE,
        "ws": "none",
    }
    public = Config(
        gate,
        http=guarded(bounds),
        lifespan="off",
        h11_max_incomplete_event_size=bounds.head_bytes,
        timeout_keep_alive=int(bounds.idle),
        ssl_context_factory=lambda *_: tls,
        **common,
    )
    return _Server(Config(LocalGate(app, secret), lifespan="on", **common)), _Server(public)


def flower_config(settings: LinkSettings, secret: bytes) -> SuperLinkLifespanConfig:
    """Return Flower's configuration: node authentication on, and nothing that runs apps or listens by itself."""
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin

    plugin = load_control_authn_plugin()
    if not isinstance(plugin, NoOpControlAuthnPlugin):
        raise TransportError("other-flower", "another edition of Flower is installed", hint="install flwr itself")
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=_LOOPBACK,
        port=settings.private_port,
        insecure=False,
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=plugin,
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(settings.database),
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        hint = "stop what listens there, or choose another port"
        raise TransportError("port-in-use", f"cannot listen on {host}:{port}: {error.strerror}", hint=hint) from error
    with listener:
        yield listener


async def _until_started(server: Server, life: asyncio.Task[None]) -> None:
    while not server.started and not life.done():  # noqa: ASYNC110 - uvicorn sets a flag and no event
        await asyncio.sleep(0.02)
    if life.done():
        life.result()
        raise TransportError("not-started", "Flower's app did not start", hint="its log says why")


def _stop_on_signal(inside: Server, outside: Server) -> None:
    def stop() -> None:
        outside.should_exit = True
        if not outside.started:
            inside.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _tell(ready: Path, public: int, private: int) -> None:
    write_whole(ready, json.dumps({"pid": os.getpid(), "private": private, "public": public}).encode() + b"\n")
    logger.info("listening: public port %d, private port %d", public, private)


def main(words: list[str]) -> int:
    """Serve by a settings file."""
    return program.run(LinkSettings, serve, words, role="link")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
