"""Children for a supervisor: small programs that say in files what they do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.processes.child import ChildSpec

ROOT = Path(__file__).parents[2]

# Writes its number and its starts, then does what its words say.
_PROGRAM = """
import json, os, signal, subprocess, sys, time
folder, name, *words = sys.argv[1:]
ready = os.path.join(folder, name + ".ready")
def write(path, text, mode="w"):
    with open(path, mode) as file:
        file.write(text)
def tell(pid):
    write(ready + ".part", json.dumps({"pid": pid}))
    os.replace(ready + ".part", ready)
def note(what):
    write(os.path.join(folder, "story"), f"{name} {what}\\n", "a")
def end(*_):
    note("ends")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
note("starts")
write(os.path.join(folder, name + ".pid"), str(os.getpid()))
for word in words:
    match word.split("=", 1):
        case ["watch"]:
            from fedtune.processes import lifeline
            lifeline.watch(patience=0.3)
        case ["deaf"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case ["say", text]:
            print(text, file=sys.stderr, flush=True)
        case ["log", text]:
            import logging
            from fedtune.processes import logs
            logs.setup(name)
            logging.getLogger("fedtune.test").error(text, extra={"code": "test.wrong", "hint": "mend it"})
        case ["ready"]:
            tell(os.getpid())
        case ["other"]:
            tell(1)
        case ["start", other]:
            words = [sys.executable, "-c", "import time; time.sleep(60)"]
            child = subprocess.Popen(words, close_fds=other == "tidy")
            write(os.path.join(folder, name + ".child"), str(child.pid))
        case ["after", seconds]:
            time.sleep(float(seconds))
        case ["once", what]:
            if os.path.exists(os.path.join(folder, name + ".again")):
                continue
            write(os.path.join(folder, name + ".again"), "")
            if what == "hang":
                time.sleep(60)
            os._exit(int(what))
        case ["exit", code]:
            os._exit(int(code))
note("works")
time.sleep(60)
"""


class Place:
    """A folder in which children leave what they did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def spec(self, name: str, *words: str, **changes: Any) -> ChildSpec:
        command = (sys.executable, "-S", "-c", _PROGRAM, str(self.folder), name, *words)
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        return ChildSpec(name, command, environment, **({"ready": self.folder / f"{name}.ready"} | changes))

    @property
    def story(self) -> list[str]:
        file = self.folder / "story"
        return file.read_text().splitlines() if file.exists() else []

    def pid(self, name: str) -> int:
        return int(wait_for(lambda: self._read(f"{name}.pid")))

    def grandchild(self, name: str) -> int:
        return int(wait_for(lambda: self._read(f"{name}.child")))

    def _read(self, name: str) -> str:
        file = self.folder / name
        return file.read_text() if file.exists() else ""


def wait_for(moment: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Return what `moment` returns as soon as it is true."""
    until = time.monotonic() + seconds
    while not (found := moment()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
    return found


def lives(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")
