"""A site's two processes, kept alive: the node, which asks the coordinator for work, and the executor, which does it.

    fedtune client up ── node:     python -m fedtune.flower.node        keys for TLS in a folder in memory
                      ── executor: python -m fedtune_client.executor    the vault's secret through a pipe
                      ── health:   http://127.0.0.1:PORT/ready          which of both are ready

Neither child has the vault's secret in its environment; the node never gets it. The folder in memory and what is in it
are removed at the end. One `up` runs a site's folder. Knows no message and no plan.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.errors import FedtuneError, ProcessError, TransportError
from fedtune.flower.environment import flower_environment, hold
from fedtune.pki.certificates import check_site, is_due, read_pem
from fedtune.processes import health, logs
from fedtune.processes.heartbeat import is_fresh
from fedtune.processes.supervisor import ChildSpec, Supervisor
from fedtune.run.files import make_folder, write_whole
from fedtune_client.enrolment import Credentials, credentials
from fedtune_client.folder import OpenSite, SiteFolder
from fedtune_client.private_folder import private_folder
from fedtune_client.secret_pipe import offered
from fedtune_client.tls_files import TlsFiles, write_tls_files
from fedtune_client.vault import Unlock, Vault

logger = logging.getLogger("fedtune.client")
_SECRET = re.compile(r"FEDTUNE_\w*(KEY|PASSPHRASE)\w*")
_LOOK, _DAY = 30.0, 86_400.0  # seconds
_NODE, _EXECUTOR = "node", "executor"


@dataclass(frozen=True, slots=True)
class Running:
    """A site that runs: whom it belongs to and where its health is told."""

    taken: Credentials
    supervisor: Supervisor
    health: str
    keep_up: Callable[[], None]

    def run(self) -> None:
        """Keep both processes alive until SIGTERM or SIGINT."""
        self.supervisor.run(self.keep_up)


@contextmanager
def running(site: OpenSite, federation: str, unlock: Unlock) -> Iterator[Running]:
    """Prepare a site's processes, which `Running.run` starts.

    Errors: `process.running` where another `up` has the folder, `process.port-in-use`, `enrolment.not-enrolled`,
    `enrolment.certificate-expired`.
    """
    folder, taken = site.folder, credentials(site.vault, federation)
    check_site(read_pem(taken.certificate), read_pem(taken.authority), taken.site, datetime.now(UTC))
    with ExitStack() as stack:
        stack.callback(os.close, _only(folder))
        _make_local_secret(folder)
        place = stack.enter_context(private_folder(folder.run))
        pipe = stack.enter_context(offered(place / "unlock", unlock))
        children = _Children(site, taken, write_tls_files(place, taken), pipe)
        supervisor = Supervisor(children.specs())
        port = stack.enter_context(health.serve(site.facts.service.health_port, lambda: readiness(supervisor)))
        _tell(folder, {"pid": os.getpid(), "health": port, "runtime": children.port, "federation": federation})
        stack.callback(_untell, folder)
        certificates = _Certificates(site.vault, federation, place, taken.certificate)
        yield Running(taken, supervisor, f"http://127.0.0.1:{port}/ready", certificates.look)


def readiness(supervisor: Supervisor) -> health.Readiness:
    """Return which of the processes work; that the coordinator is reached is not among it."""
    parts = {state.name: state.status for state in supervisor.states}
    restarts = {state.name: state.restarts for state in supervisor.states}
    return health.Readiness(all(status == "ready" for status in parts.values()), parts, {"restarts": restarts})


def told(folder: SiteFolder) -> Mapping[str, Any] | None:
    """Return what a running `up` has written down, None where none runs."""
    if not folder.run.is_dir():
        return None
    try:
        os.close(_only(folder))
    except ProcessError:
        with suppress(OSError, ValueError):
            found = json.loads(_facts_file(folder).read_bytes())
            return found if isinstance(found, dict) else {}
        return {}
    return None


class _Children:
    """What each process is started with."""

    def __init__(self, site: OpenSite, taken: Credentials, tls: TlsFiles, pipe: Path) -> None:
        self._folder, self._taken, self._tls, self._pipe = site.folder, taken, tls, pipe
        self._poll = site.facts.service.poll
        self.port = site.facts.service.runtime_port or _free_port()

    def specs(self) -> tuple[ChildSpec, ChildSpec]:
        return self._node(), self._executor()

    def _node(self) -> ChildSpec:
        settings = {
            "state": self._folder.node.absolute(),
            "coordinator": self._taken.address,
            "authority": self._tls.authority,
            "certificate": self._tls.certificate,
            "key": self._tls.key,
            "node_key": self._tls.node_key,
            "runtime_port": self.port,
            "poll": self._poll,
        }
        return self._spec(_NODE, "fedtune.flower.node", settings, self._answers)

    def _executor(self) -> ChildSpec:
        settings = {
            "site": self._folder.path.absolute(),
            "federation": self._taken.federation,
            "port": self.port,
            "unlock": self._pipe,
        }
        return self._spec(_EXECUTOR, "fedtune_client.executor", settings, self._beats)

    def _spec(self, name: str, module: str, settings: Mapping[str, Any], probe: Callable[[], bool]) -> ChildSpec:
        file, ready = self._tls.authority.with_name(f"{name}.json"), _ready(self._folder, name)
        common = {"secret": self._folder.secret.absolute(), "ready": ready}
        write_whole(file, json.dumps({**settings, **common}, default=str).encode())
        command = (sys.executable, "-m", module, str(file))
        return ChildSpec(name, command, _environment(self._folder), ready=ready, probe=probe)

    def _answers(self) -> bool:
        return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5, trust_env=False).is_success

    def _beats(self) -> bool:
        """Whether the executor touched its file lately: it is busy for as long as a round takes."""
        return is_fresh(_ready(self._folder, _EXECUTOR))


@dataclass(slots=True)
class _Certificates:
    """Looks for a renewed grant, so that a node that starts again shows it, and says when one has to be asked for."""

    vault: Vault
    federation: str
    place: Path
    certificate: str
    _due: float = field(default_factory=time.monotonic)
    _told: float = -math.inf

    def look(self) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _LOOK
        try:
            taken = credentials(self.vault, self.federation)
        except FedtuneError as error:  # a passphrase that was changed: the processes go on with what they have
            logger.warning("the vault cannot be read", extra={"code": error.code, "hint": error.hint})
            return
        if taken.certificate != self.certificate:
            write_tls_files(self.place, taken)
            self.certificate = taken.certificate
            logger.info("a renewed certificate is here; the node shows it when it starts next")
        certificate = read_pem(self.certificate)
        if now >= self._told + _DAY and is_due(certificate, datetime.now(UTC)):
            self._told = now
            end = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
            logger.warning("the certificate ends on %s", end, extra={"hint": "fedtune client renew"})


def _environment(folder: SiteFolder) -> dict[str, str]:
    """Return a child's environment: Flower's switches, no secret, and nothing of a simulation."""
    kept = {name: value for name, value in os.environ.items() if not _SECRET.fullmatch(name) and name != MACHINE}
    return flower_environment(folder.node.absolute(), kept) | {logs.FOLDER: str(folder.logs.absolute())}


def _only(folder: SiteFolder) -> int:
    """Hold the folder for this process alone. Error: `process.running`."""
    try:
        return hold(folder.run)
    except TransportError as error:
        hint = "stop that one first: Ctrl-C where it runs, or systemctl stop"
        raise ProcessError("running", f"a client runs the site {folder.path} already", hint=hint) from error


def _make_local_secret(folder: SiteFolder) -> None:
    from fedtune.flower.local_gate import make_secret

    make_secret(folder.secret)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _ready(folder: SiteFolder, name: str) -> Path:
    return folder.run.absolute() / f"{name}.ready"


def _facts_file(folder: SiteFolder) -> Path:
    return folder.run / "up.json"


def _tell(folder: SiteFolder, facts: Mapping[str, Any]) -> None:
    make_folder(folder.run)
    write_whole(_facts_file(folder), json.dumps(facts).encode() + b"\n")


def _untell(folder: SiteFolder) -> None:
    with suppress(OSError):
        _facts_file(folder).unlink(missing_ok=True)
