"""The two federations that are compared, each a SuperLink, SuperNodes over TLS with their own keys, and executors.

`Fedtune`: link, nodes with client certificates, resident executors. `Stock`: Flower's own programs as they come, which
start a process for each message; `database` says whether the SuperLink keeps its state in a file, as a coordinator that
survives its own death has to, or in memory, which is its default. Knows no measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from benchmarks.deployment.processes import Processes, free_port
from fedtune.errors import TransportError
from fedtune.flower.bundle import build
from fedtune.flower.local_gate import make_secret, read_secret
from fedtune.flower.submission import Control
from tests.support.certificates import Authority, node_key

PARTS = ("link", "node", "site executor", "coordinator executor")
_STOCK_PROJECT = """\
[project]
name = "stock"
version = "1.0.0"
description = "rounds that are measured"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "stock_app:server"
clientapp = "stock_app:client"

[tool.flwr.app.config]
plan = {plan}
"""


class Federation(Protocol):
    """A running federation; `parts` are the names of its processes in the order of PARTS."""

    parts: tuple[str, ...]
    processes: Processes

    def start(self, sites: int) -> None:
        """Start every process and wait until each site is connected."""

    def run(self, plan: Mapping[str, Any], seconds: float) -> None:
        """Run a plan to its end, which is expected within so many seconds."""

    def state_bytes(self) -> int:
        """Return the bytes of the SuperLink's state on disk."""


class Fedtune:
    """fedtune's processes; `executor` is the module that serves a role: `python -m MODULE ROLE PORT SECRET`."""

    parts = PARTS

    def __init__(self, folder: Path, executor: str = "benchmarks.deployment.apps") -> None:
        self.processes = Processes(folder)
        self._folder, self._executor = folder, executor
        self._authority = Authority.make(folder / "authority")
        self._ports: dict[str, int] = {}

    def start(self, sites: int) -> None:
        """Start link, nodes and executors."""
        self._start_link()
        for number in range(sites):
            self._start_site(f"site-{number}")
        self._start_executor("coordinator", "coordinator", self._ports["private"])
        with self._control() as control:
            self.processes.until(lambda: [node.status for node in control.nodes()] == ["online"] * sites)

    def run(self, plan: Mapping[str, Any], seconds: float) -> None:
        """Run a plan."""
        with self._control() as control:
            number = control.start(build(json.dumps(plan)))
            _until_finished(self.processes, lambda: control.run(number), seconds)
            if control.run(number).outcome != "completed":
                raise RuntimeError(f"the run ended with {control.run(number).details}")

    def state_bytes(self) -> int:
        """Return the bytes of the SuperLink's database with its log and its objects."""
        return _bytes(self._folder / "link", "link.db*") + _bytes(self._folder / "link" / "link.db.objects", "*")

    def _start_link(self) -> None:
        server = self._authority.server()
        found = self._start_module(
            "link",
            "link",
            state=self._folder / "link",
            certificate=server.certificate_file,
            key=server.key_file,
            client_authority=self._authority.file,
            secret=self._secret("coordinator"),
            public_host="127.0.0.1",
            public_port=0,
            private_port=0,
        )
        self._ports |= {"public": found["public"], "private": found["private"]}

    def _start_site(self, name: str) -> None:
        shown, key = self._authority.site(name), node_key(self._folder / f"{name}.node")
        with self._control() as control:
            control.register(key.public_key(), name)
        found = self._start_module(
            "node",
            name,
            state=self._folder / name,
            coordinator=f"127.0.0.1:{self._ports['public']}",
            authority=self._authority.file,
            certificate=shown.certificate_file,
            key=shown.key_file,
            node_key=self._folder / f"{name}.node",
            secret=self._secret(name),
            runtime_port=0,
        )
        self._start_executor("site", name, found["runtime"])

    def _start_executor(self, role: str, name: str, port: int) -> None:
        words = [self._executor, role, str(port), str(self._secret(name))]
        self.processes.module(f"{role} executor", f"{name}.executor", *words)

    def _start_module(self, module: str, label: str, **settings: Any) -> dict[str, int]:
        file, ready = self._folder / f"{label}.json", self._folder / f"{label}.ready"
        file.write_text(json.dumps(settings | {"ready": ready}, default=str), encoding="utf-8")
        self.processes.module(module, label, f"fedtune.flower.{module}", str(file))
        self.processes.until(ready.exists)
        found: dict[str, int] = json.loads(ready.read_bytes())
        return found

    def _secret(self, name: str) -> Path:
        path = self._folder / f"{name}.secret"
        make_secret(path)
        return path

    def _control(self) -> Control:
        return Control(self._ports["private"], read_secret(self._secret("coordinator")))


class Stock:
    """Flower's own programs, with TLS and node authentication."""

    parts = ("superlink", "supernode", "flwr-clientapp", "flwr-serverapp")

    def __init__(self, folder: Path, *, database: bool) -> None:
        self.processes = Processes(folder)
        self._folder, self._database = folder, folder / "state.db" if database else None
        self._authority = Authority.make(folder / "authority")
        self._server = self._authority.server()
        self._port = free_port()

    def start(self, sites: int) -> None:
        """Start a SuperLink and SuperNodes, which start what they need."""
        authority, server = str(self._authority.file), self._server
        tls = ["--ssl-ca-certfile", authority, "--ssl-certfile", str(server.certificate_file)]
        words = [*tls, "--ssl-keyfile", str(server.key_file), "--host", "127.0.0.1", "--port", str(self._port)]
        words += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        words += ["--database", str(self._database)] if self._database else []
        self.processes.start("superlink", "superlink", ["flower-superlink", *words])
        self.processes.until(self._answers)
        for number in range(sites):
            self._start_site(f"site-{number}")

    def run(self, plan: Mapping[str, Any], seconds: float) -> None:
        """Run a plan."""
        bundle = self._bundle(plan)
        digest = hashlib.sha256(bundle).hexdigest()
        client = self._control()
        number = client.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, bundle, {})))).run_id

        def run() -> Any:
            return client.ListRuns(ListRunsRequest(run_id=number)).run_dict[number].status

        _until_finished(self.processes, run, seconds)
        found = run()
        client.close()
        if found.sub_status != "completed":
            raise RuntimeError(f"the run ended with {found.details}")

    def state_bytes(self) -> int:
        """Return the bytes of the SuperLink's database with its log, 0 for a state in memory."""
        return _bytes(self._folder, "state.db*")

    def _start_site(self, name: str) -> None:
        key: ec.EllipticCurvePrivateKey = node_key(self._folder / f"{name}.node")
        client = self._control()
        client.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key.public_key()), name=name))
        client.close()
        words = ["--superlink", f"127.0.0.1:{self._port}", "--root-certificates", str(self._authority.file)]
        words += ["--auth-supernode-private-key", str(self._folder / f"{name}.node")]
        words += ["--host", "127.0.0.1", "--port", str(free_port())]
        self.processes.start("supernode", name, ["flower-supernode", *words])

    def _bundle(self, plan: Mapping[str, Any]) -> bytes:
        from flwr.cli.build import build_fab_from_files

        project = _STOCK_PROJECT.format(plan=json.dumps(json.dumps(plan)))
        app = Path(__file__).with_name("stock_app.py")
        return build_fab_from_files({"pyproject.toml": project.encode(), "stock_app.py": app.read_bytes()})[0]

    def _control(self) -> ControlHttpClient:
        authority = self._authority.file.read_bytes()
        return ControlHttpClient.from_server_address(f"127.0.0.1:{self._port}", False, authority, [])

    def _answers(self) -> bool:
        client = self._control()
        try:
            client.ListRuns(ListRunsRequest(limit=1))
        except httpx.ConnectError:
            return False
        finally:
            client.close()
        return True


def _bytes(folder: Path, pattern: str) -> int:
    """Return the bytes of files, some of which may go while they are looked at."""
    size = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def _until_finished(processes: Processes, run: Any, seconds: float) -> None:
    """Wait for a run's end; a question that is not answered is asked again, and said at the end."""
    unanswered = 0

    def finished() -> bool:
        nonlocal unanswered
        time.sleep(0.5)  # asking is work for the SuperLink too
        try:
            found: str = run().status
        except (httpx.HTTPError, TransportError):
            unanswered += 1
            return False
        return found == "finished"

    try:
        processes.until(finished, seconds)
    finally:
        if unanswered:
            print(f"the SuperLink did not answer {unanswered} questions", file=sys.stderr, flush=True)
