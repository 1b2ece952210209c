"""What `fedtune server up` keeps running: the SuperLink, the executor, and beside them conductor and registrar.

    supervisor ── link       public port for sites, private port for processes of this machine
               ├─ executor   runs the studies' ServerApps
               └─ Steward    in a thread of the supervisor: starts studies, registers sites

The children get no secret of the authority's. Knows no command line.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.flower.environment import flower_environment
from fedtune.pki.authority import CA_FILE, COORDINATOR_FILE
from fedtune.processes import heartbeat, logs
from fedtune.processes.health import Readiness
from fedtune.processes.supervisor import ChildSpec, ChildState
from fedtune.run.files import write_whole
from fedtune_server.enrolment import REVOKED_FILE
from fedtune_server.executor import CoordinatorExecutorSettings
from fedtune_server.folder import ENVIRONMENT_VARIABLE as COORDINATOR
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.settings import CoordinatorSettings
from fedtune_server.studies.steward import EXECUTOR, LINK, Steward

if TYPE_CHECKING:
    from fedtune.flower.link import LinkSettings

_SECRETS = "FEDTUNE_AUTHORITY_"
_PROBE_SECONDS = 5.0


def with_ports(settings: CoordinatorSettings) -> CoordinatorSettings:
    """Return the settings with a free port for each that is 0, so that a process that is restarted keeps its own."""
    listen = settings.listen.model_copy(update={"port": settings.listen.port or _free_port(settings.listen.host)})
    return settings.model_copy(update={"listen": listen, "private_port": settings.private_port or _free_port()})


def children(folder: CoordinatorFolder, settings: CoordinatorSettings) -> tuple[ChildSpec, ...]:
    """Write down the settings of the processes and return how they are started, in their order."""
    link, executor = _link(folder, settings), _executor(folder, settings)
    base = {name: value for name, value in os.environ.items() if not name.startswith(_SECRETS) and name != MACHINE}
    ours = {COORDINATOR: str(folder.path.absolute()), logs.FOLDER: str(folder.logs.absolute())}
    environment = flower_environment(folder.link / "flower", base) | ours
    return (
        ChildSpec(
            LINK,
            _command("fedtune.flower.link", folder.run / "link-settings.json", link),
            environment,
            ready=link.ready,
            probe=lambda: _answers(settings.private_port),
        ),
        ChildSpec(
            EXECUTOR,
            _command("fedtune_server.executor", folder.run / "executor-settings.json", executor),
            environment,
            ready=executor.ready,
            starting=300.0,  # torch and transformers from a cold disk
            probe=lambda: heartbeat.is_fresh(executor.ready),
        ),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What `/ready` says: every process works, and how many studies are in which state."""

    states: Callable[[], Sequence[ChildState]]
    steward: Steward

    def __call__(self) -> Readiness:
        """Return it as of now."""
        states = self.states()
        detail = {
            "processes": [
                {
                    "name": state.name,
                    "status": state.status,
                    "pid": state.pid,
                    "restarts": state.restarts,
                    "last_exit": state.last_exit,
                    "since": state.since,
                    "next_start": state.next_start,
                }
                for state in states
            ],
            "studies": dict(self.steward.studies),
        }
        parts = {state.name: state.status for state in states}
        return Readiness(all(state.status == "ready" for state in states), parts, detail)


@contextmanager
def told(folder: CoordinatorFolder, health_port: int) -> Iterator[None]:
    """Let commands of this machine know where the supervisor answers, while the block runs."""
    file = _supervisor_file(folder)
    write_whole(file, json.dumps({"pid": os.getpid(), "health": health_port}).encode() + b"\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def ask(folder: CoordinatorFolder) -> Readiness | None:
    """Return what the coordinator that runs in a folder says of itself, None where none answers."""
    import httpx

    try:
        port = int(json.loads(_supervisor_file(folder).read_bytes())["health"])
        with httpx.Client(timeout=_PROBE_SECONDS, trust_env=False) as client:
            found = client.get(f"http://127.0.0.1:{port}/ready").json()
        return Readiness(bool(found["ready"]), dict(found["parts"]), dict(found["detail"]))
    except (OSError, ValueError, KeyError, TypeError, httpx.HTTPError):
        return None


def _supervisor_file(folder: CoordinatorFolder) -> Path:
    return folder.run / "supervisor.json"


def _link(folder: CoordinatorFolder, settings: CoordinatorSettings) -> LinkSettings:
    from fedtune.flower.link import LinkSettings

    limits = settings.limits
    return LinkSettings(
        state=folder.link.absolute(),
        certificate=(folder.authority / COORDINATOR_FILE).absolute(),
        key=(folder.authority / COORDINATOR_FILE).absolute(),
        client_authority=(folder.authority / CA_FILE).absolute(),
        secret=folder.secret.absolute(),
        ready=folder.link_ready.absolute(),
        revoked=(folder.enrolment / REVOKED_FILE).absolute(),
        public_host=settings.listen.host,
        public_port=settings.listen.port,
        private_port=settings.private_port,
        max_body=limits.max_body,
        max_held=limits.max_held,
        max_connections=limits.max_connections,
    )


def _executor(folder: CoordinatorFolder, settings: CoordinatorSettings) -> CoordinatorExecutorSettings:
    return CoordinatorExecutorSettings(
        folder=folder.path.absolute(),
        port=settings.private_port,
        secret=folder.secret.absolute(),
        ready=(folder.run / "executor.json").absolute(),
    )


def _command(module: str, file: Path, settings: LinkSettings | CoordinatorExecutorSettings) -> tuple[str, ...]:
    write_whole(file, settings.model_dump_json(indent=2).encode() + b"\n")
    return (sys.executable, "-m", module, str(file.absolute()))


def _answers(port: int) -> bool:
    """Whether the SuperLink answers on its private port."""
    import httpx

    with httpx.Client(timeout=_PROBE_SECONDS, trust_env=False) as client:
        return client.get(f"http://127.0.0.1:{port}/health").is_success


def _free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
