"""Processes of one measurement: each with a log, ended with it, and with no way to look anything up outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.flower.environment import flower_environment

_ROOT = Path(__file__).parents[2]
_START = 60.0


class Processes:
    """Starts processes in a folder; `names` says which process plays which part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[int, str] = {}
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, part: str, label: str, words: list[str]) -> None:
        """Start a program; its log is LABEL.log."""
        with (self.folder / f"{label}.log").open("ab") as log:
            process = subprocess.Popen(words, env=self._environment(), stdout=log, stderr=log, cwd=self.folder)
        self._running.append((label, process))
        self.names = {**self.names, process.pid: part}

    def module(self, part: str, label: str, *words: str) -> None:
        """Start a Python module."""
        self.start(part, label, [sys.executable, "-m", *words])

    def until(self, moment: Callable[[], Any], seconds: float = _START) -> Any:
        """Return what `moment` returns as soon as it is true; say whose log to read when it does not come."""
        until = time.monotonic() + seconds
        while not (found := moment()):
            for label, process in self._running:
                if process.poll() is not None:
                    raise RuntimeError(f"{label} ended:\n{self._log(label)}")
            if time.monotonic() > until:
                logs = "\n".join(f"--- {label}\n{self._log(label)}" for label, _ in self._running)
                raise TimeoutError(f"it did not happen within {seconds:.0f} s:\n{logs}")
            time.sleep(0.02)
        return found

    def close(self) -> None:
        """End every process, the last first."""
        for _, process in reversed(self._running):
            process.terminate()
        for _, process in reversed(self._running):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self, label: str) -> str:
        return (self.folder / f"{label}.log").read_text(errors="replace")[-1500:]

    def _environment(self) -> dict[str, str]:
        environment = flower_environment(self.folder / "flower", os.environ)
        packages = [str(_ROOT / name) for name in (".", "server", "client")]
        environment["PYTHONPATH"] = os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")])
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return environment


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
