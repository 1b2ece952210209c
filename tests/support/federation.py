"""A coordinator's SuperLink, sites' SuperNodes and executors as processes of their own, on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.flower.environment import flower_environment
from fedtune.flower.local_gate import make_secret, read_secret
from fedtune.flower.submission import Control
from tests.support.certificates import Authority, Credential, node_key

ROOT = Path(__file__).parents[2]
HOOK = Path(__file__).parent / "no_lookups"


def wait_for(moment: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Return what `moment` returns as soon as it is true."""
    until = time.monotonic() + seconds
    while not (found := moment()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)
    return found


@dataclass
class Federation:
    """The processes of one test; every one is ended with it, and none looks anything up outside."""

    folder: Path
    authority: Authority
    server: Credential
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path) -> Federation:
        authority = Authority.make(folder / "authority")
        make_secret(folder / "coordinator.secret")
        (folder / "revoked").write_text("")
        return cls(folder, authority, authority.server())

    @property
    def secret(self) -> bytes:
        return read_secret(self.folder / "coordinator.secret")

    @property
    def lookups(self) -> Path:
        return self.folder / "lookups"

    def control(self) -> Control:
        return Control(self.ports["private"], self.secret)

    def start_link(self, **changes: Any) -> None:
        settings = {
            "state": self.folder / "link",
            "certificate": self.server.certificate_file,
            "key": self.server.key_file,
            "client_authority": self.authority.file,
            "secret": self.folder / "coordinator.secret",
            "revoked": self.folder / "revoked",
            "ready": self.folder / "link.ready",
            "public_host": "127.0.0.1",
            "public_port": self.ports.get("public", 0),
            "private_port": self.ports.get("private", 0),
        }
        found = self._start_module("link", "fedtune.flower.link", settings | changes)
        self.ports |= {"public": found["public"], "private": found["private"]}

    def start_node(self, name: str, shown: Credential | None = None) -> int:
        """Enrol a site and start its SuperNode; return the node's number."""
        shown = shown or self.authority.site(name)
        key = node_key(self.folder / f"{name}.node")
        with self.control() as control:
            number = control.register(key.public_key(), name)
        self.restart_node(name, shown)
        return number

    def restart_node(self, name: str, shown: Credential) -> None:
        make_secret(self.folder / f"{name}.secret")
        settings = {
            "state": self.folder / name,
            "coordinator": f"127.0.0.1:{self.ports['public']}",
            "authority": self.authority.file,
            "certificate": shown.certificate_file,
            "key": shown.key_file,
            "node_key": self.folder / f"{name}.node",
            "secret": self.folder / f"{name}.secret",
            "ready": self.folder / f"{name}.ready",
            "runtime_port": self.ports.get(name, 0),
            "poll": 0.1,
        }
        self.ports[name] = self._start_module(name, "fedtune.flower.node", settings)["runtime"]

    def start_executor(self, name: str, function: str, port: int, secret: Path) -> None:
        """Run one of `tests.support.toy_apps`' functions in a process of its own."""
        self._start(f"{name}.executor", ["-m", "tests.support.toy_apps", function, str(port), str(secret)])

    def start_site_executor(self, name: str, function: str = "site") -> None:
        self.start_executor(name, function, self.ports[name], self.folder / f"{name}.secret")

    def start_coordinator_executor(self, function: str = "coordinator") -> None:
        self.start_executor("coordinator", function, self.ports["private"], self.folder / "coordinator.secret")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def end(self, name: str, number: int = signal.SIGTERM) -> int:
        """Send a signal to a process and return how it ended."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(15)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait(15)

    def _start_module(self, name: str, module: str, settings: Mapping[str, Any]) -> dict[str, int]:
        file, ready = self.folder / f"{name}.json", Path(settings["ready"])
        ready.unlink(missing_ok=True)
        file.write_text(json.dumps(dict(settings), default=str))
        process = self._start(name, ["-m", module, str(file)])
        wait_for(lambda: ready.exists() or process.poll() is not None)
        assert process.poll() is None, self.log(name)
        found: dict[str, int] = json.loads(ready.read_text())
        return found

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        environment = flower_environment(self.folder / "flower", os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), str(ROOT), environment.get("PYTHONPATH", "")])
        environment["FEDTUNE_LOOKUPS"] = str(self.lookups)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
        self.processes[name] = process
        return process
