"""A site that `fedtune client up` runs, and the SuperLink that it connects to: processes of their own on loopback.

The coordinator's side is as little as it needs to be: a ServerApp in a thread of the test that sends what it is given.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedtune.flower.bundle import build
from fedtune.flower.environment import flower_environment
from fedtune.flower.executor import ExecutorSettings, serve_coordinator
from fedtune.flower.local_gate import make_secret, read_secret
from fedtune.flower.submission import Control
from fedtune.pki.authority import COORDINATOR_FILE, write_coordinator
from fedtune.pki.certificates import pem
from fedtune.pki.keys import read_node_key
from fedtune_client.channel import begin_memory
from tests.support.enrolments import Coordinator, Now, Site
from tests.support.federation import HOOK, ROOT, wait_for
from tests.support.residents import Resident, point_at_all
from tests.support.sites import SERVICE_KEY, make_site, make_study


@dataclass
class Live:
    """One federation of one site; `ask` sends a message through all of it."""

    folder: Path
    resident: Resident
    ports: dict[str, int] = field(default_factory=dict)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    questions: queue.Queue[tuple[RecordDict, str] | None] = field(default_factory=queue.Queue)
    answers: queue.Queue[Message] = field(default_factory=queue.Queue)
    site_process: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(cls, folder: Path) -> Live:
        """Start the link, enrol the site with its node, and begin a run of the study's plan."""
        study = make_study(folder)
        coordinator = Coordinator(folder / "coordinator", Now(datetime.now(UTC)))
        site = make_site(folder / "site", study)
        point_at_all(site)
        made = cls(folder, Resident.of(site, coordinator))
        made._start_link()
        joining = Site(site.open(), coordinator.now)
        address = f"127.0.0.1:{made.ports['public']}"
        request = joining.answer(coordinator.invite("mercy"))
        joining.accept(coordinator.enrolment.approve(request, coordinator.authority, address))
        begin_memory(site.folder)
        site.restart()
        with made.control() as control:
            control.register(read_node_key(coordinator.enrolment.members[0].grant.node_key), "mercy")
            control.start(build(study.plan.json_text))
        made._start_coordinator()
        return made

    @property
    def run_folder(self) -> Path:
        return self.resident.site.folder.run

    def control(self) -> Control:
        return Control(self.ports["private"], read_secret(self.folder / "link.secret"))

    def up(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start `fedtune client up` and wait until both of its processes are ready."""
        process = self.site_process = self.start_up(**environment)
        wait_for(lambda: process.poll() is not None or self.ready(), 90)
        assert process.poll() is None, self.log
        return process

    def start_up(self, **environment: str) -> subprocess.Popen[bytes]:
        words = ["-m", "fedtune.cli", "client", "up", "--site", str(self.resident.site.path)]
        return self._start("up", words, {"FEDTUNE_VAULT_KEY": SERVICE_KEY, "FEDTUNE_MACHINE": "a/b", **environment})

    def ready(self) -> bool:
        try:
            port = json.loads((self.run_folder / "up.json").read_bytes())["health"]
            return httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).is_success
        except (OSError, httpx.HTTPError):
            return False

    def pid(self, name: str) -> int:
        """Return the process of the node or the executor that runs now."""
        return int(json.loads((self.run_folder / f"{name}.ready").read_bytes())["pid"])

    def ask(self, content: RecordDict, kind: str = "train") -> Message:
        """Send a message as it is through the link, and return what comes back."""
        self.questions.put((content, kind))
        return self.answers.get(timeout=120)

    @property
    def log(self) -> str:
        return (self.folder / "up.log").read_text()

    def close(self) -> None:
        self.questions.put(None)
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)

    def _start_link(self) -> None:
        place, coordinator = self.folder / "tls", self.resident.coordinator
        place.mkdir()
        (place / "ca.pem").write_text(pem(coordinator.authority.certificate))
        write_coordinator(place, coordinator.authority, ["127.0.0.1", "localhost"], coordinator.now())
        make_secret(self.folder / "link.secret")
        settings = {
            "state": self.folder / "link",
            "certificate": place / COORDINATOR_FILE,
            "key": place / COORDINATOR_FILE,
            "client_authority": place / "ca.pem",
            "secret": self.folder / "link.secret",
            "revoked": coordinator.folder / "revoked.txt",
            "ready": self.folder / "link.ready",
            "public_host": "127.0.0.1",
            "public_port": 0,
            "private_port": 0,
        }
        (self.folder / "link.json").write_text(json.dumps(settings, default=str))
        process = self._start("link", ["-m", "fedtune.flower.link", str(self.folder / "link.json")], {})
        wait_for(lambda: process.poll() is not None or (self.folder / "link.ready").exists(), 60)
        found = json.loads((self.folder / "link.ready").read_bytes())
        self.ports |= {"public": found["public"], "private": found["private"]}

    def _start_coordinator(self) -> None:
        """Serve the run in a thread: each question is sent to the one node, and its reply handed back."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, _context: Context) -> None:
            while (question := self.questions.get()) is not None:
                content, kind = question
                wait_for(lambda: list(grid.get_node_ids()), 60)
                (node,) = grid.get_node_ids()
                message = Message(content, node, kind, ttl=100.0, group_id="1")
                (reply,) = grid.send_and_receive([message], timeout=100)
                self.answers.put(reply)

        settings = ExecutorSettings(self.ports["private"], self.folder / "link.secret")
        threading.Thread(target=serve_coordinator, args=(settings, app), daemon=True).start()

    def _start(self, name: str, words: list[str], more: dict[str, str]) -> subprocess.Popen[bytes]:
        environment = flower_environment(self.folder / "flower", os.environ) | more
        places = [str(HOOK), str(ROOT), str(ROOT / "server"), str(ROOT / "client"), environment.get("PYTHONPATH", "")]
        environment |= {"PYTHONPATH": os.pathsep.join(places), "FEDTUNE_LOOKUPS": str(self.folder / "lookups")}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill(pid: int) -> None:
    """SIGKILL a process and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 30
    while not gone(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def environment_of(pid: int) -> dict[str, Any]:
    """Return what a process was started with."""
    raw = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(entry.decode().split("=", 1) for entry in raw if b"=" in entry)
