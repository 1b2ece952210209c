"""A whole federation on one machine: `fedtune server up` and `fedtune client up` as real processes, over TLS.

Folders are prepared by the same functions that the commands call (the walk-through's test goes through the commands);
what runs are the commands themselves, with a hook in every process that writes down each look-up and each address
outside of loopback.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.flower.local_gate import read_secret
from fedtune.flower.submission import Control
from fedtune.pki.authority import Authority, Secret
from fedtune.run.folder import RunFolder
from fedtune_client import enrolment as joining
from fedtune_client import operator
from fedtune_client.folder import OpenSite, SiteFolder, begin, open_site_folder
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.enrolment import Enrolment
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.initial import Wish
from fedtune_server.initial import begin as begin_coordinator
from fedtune_server.studies.record import Attempts, read_attempts
from fedtune_server.studies.store import StudyStore
from tests.support.federation import HOOK, ROOT, wait_for
from tests.support.sites import KEY, SERVICE_KEY, policy_of

SECRET = Secret.key(bytes(32))


@dataclass
class Deployment:
    """A coordinator, its sites and their processes; `model` is a base model's folder or `package:NAME`."""

    folder: Path
    model: str
    host: str = "127.0.0.1"
    poll: float = 0.2
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    wrap: Mapping[str, Sequence[str]] = field(default_factory=dict)
    threads: int = 1

    def __post_init__(self) -> None:
        self.port = free_port()
        begin_coordinator(self.coordinator, Wish.of("banks", f"{self.host}:{self.port}"), SECRET)
        self._edit_settings()

    @property
    def coordinator(self) -> CoordinatorFolder:
        return CoordinatorFolder(self.folder / "coordinator")

    @property
    def store(self) -> StudyStore:
        return StudyStore(self.coordinator)

    @property
    def enrolment(self) -> Enrolment:
        return Enrolment.open(self.coordinator.enrolment, coordinator_key(self.coordinator.key_file))

    @property
    def authority(self) -> Authority:
        return Authority.load(self.coordinator.authority, SECRET)

    def site(self, name: str) -> SiteFolder:
        return SiteFolder(self.folder / name)

    def open(self, name: str) -> OpenSite:
        return open_site_folder(self.site(name), KEY)

    def join(self, name: str, data: Mapping[str, Path]) -> None:
        """Let a site begin and enrol."""
        now, enrolment, authority = datetime.now(UTC), self.enrolment, self.authority
        site = begin(self.site(name), name, KEY)
        lines = [f"name: {name}", f"threads: {self.threads}", f"poll: {self.poll}", "runtime_port: 0"]
        lines += ["health_port: 0", "device: cpu", "models:", f"  base: {self.model}", "data:"]
        lines += [f"  {called}:\n    path: {path}" for called, path in data.items()]
        (site.folder.path / "site.yaml").write_text("\n".join(lines) + "\n")
        invitation = enrolment.invite(name, f"{self.host}:{self.port}", authority.certificate)
        grant = enrolment.approve(joining.answer(site, invitation, now), authority)
        joining.accept(site, grant, enrolment.federation, now)

    def allow(self, name: str, plan: StudyPlan, **changes: Any) -> None:
        """Let a site adopt what the plan needs and nothing more, and grant its data to the plan's purpose."""
        site = self.open(name)
        operator.adopt(site, policy_of(plan, **changes))
        operator.grant(site, plan.data.name, plan.purpose, None, None)

    def submit(self, plan: StudyPlan, sites: Iterable[str], model_folder: str) -> RunFolder:
        """Hand a study to the coordinator."""
        place = self.coordinator.study(plan)
        machine = Machine(run_dir=str(place), model_folder=model_folder, threads=self.threads)
        return RunFolder(self.store.submit(plan, sorted(sites), machine).path)

    def server_up(self) -> None:
        self._start("server", ["server", "up", "--dir", str(self.coordinator.path)], {})

    def client_up(self, name: str, hook: str = "") -> None:
        """Start a site; `hook` is a module that each of its processes imports first."""
        more = {"FEDTUNE_VAULT_KEY": SERVICE_KEY, **({"FEDTUNE_TEST_HOOK": hook} if hook else {})}
        self._start(name, ["client", "up", "--site", str(self.site(name).path)], more)

    def up(self, *names: str) -> None:
        self.server_up()
        for name in names:
            self.client_up(name)

    def control(self) -> Control:
        return Control(self.coordinator.private_port(), read_secret(self.coordinator.secret))

    def pid(self, role: str, process: str) -> int:
        """Return the process id of a part: link or executor of `server`, node or executor of a site, `up` of either."""
        if process == "up":
            return self.processes[role].pid
        run = self.coordinator.run if role == "server" else self.site(role).run
        file = run / (f"{process}.json" if role == "server" else f"{process}.ready")
        return int(json.loads(wait_for(lambda: file.exists() and file.read_bytes(), 60.0))["pid"])

    def kill(self, role: str, process: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a part, and return the process id that it went to."""
        pid = self.pid(role, process)
        os.kill(pid, number)
        if process == "up" and number == signal.SIGKILL:
            self.processes.pop(role).wait(30)
        return pid

    def finished(self, study: RunFolder, seconds: float) -> dict[str, Any]:
        """Wait for a study's result."""
        summary = wait_for(study.summary, seconds)
        assert isinstance(summary, dict)
        return summary

    def attempts(self, study: RunFolder) -> Attempts:
        return read_attempts(study.path)

    def log(self, role: str) -> str:
        """Everything that a role has logged, its last words too."""
        folder = self.coordinator.logs if role == "server" else self.site(role).logs
        texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*"))] if folder.exists() else []
        return "".join([*texts, (self.folder / f"{role}.out").read_text(errors="replace")])

    @property
    def lookups(self) -> str:
        """What any process looked up, or reached outside of this machine."""
        file = self.folder / "lookups"
        return file.read_text() if file.exists() else ""

    def end(self, role: str, number: int = signal.SIGTERM) -> int:
        process = self.processes.pop(role)
        process.send_signal(number)
        return process.wait(60)

    def close(self) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        self.processes.clear()

    def _edit_settings(self) -> None:
        file = self.coordinator.facts_file
        found = {"federation": self.enrolment.federation, "address": f"{self.host}:{self.port}"}
        lines = [f"{key}: {value}" for key, value in found.items()]
        lines += ["listen:", f"  host: {self.host}", f"  port: {self.port}", "private_port: 0", "health_port: 0"]
        lines += ["models:", f"  base: {self.model}", "device: cpu", f"threads: {self.threads}"]
        file.write_text("\n".join(lines) + "\n")

    def _start(self, role: str, words: list[str], more: Mapping[str, str]) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDTUNE_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), str(ROOT), environment.get("PYTHONPATH", "")])
        environment |= {"FEDTUNE_LOOKUPS": str(self.folder / "lookups"), "OMP_NUM_THREADS": str(self.threads), **more}
        command = [*self.wrap.get(role, ()), sys.executable, "-m", "fedtune.cli", *words]
        with (self.folder / f"{role}.out").open("ab") as out:
            self.processes[role] = subprocess.Popen(command, env=environment, stdout=out, stderr=out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
