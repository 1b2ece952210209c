"""What processes take while they are watched: the largest resident set of each kind (VmHWM), disk, and CPU seconds."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

_EVERY = 0.05  # seconds; a process's peak is the kernel's own, only what comes after the last look is missed


class Peaks:
    """Watches named processes and all their descendants, which have their programs' names; `disk` returns bytes."""

    def __init__(self, roots: Mapping[int, str], disk: Callable[[], int]) -> None:
        self._roots, self._disk = roots, disk
        self._found: dict[str, int] = defaultdict(int)
        self._ended = threading.Event()
        self._cpu = 0
        self._thread = threading.Thread(target=self._watch, name="peaks", daemon=True)

    def __enter__(self) -> Self:
        self._cpu = -self._cpu_until_now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._cpu += self._cpu_until_now()

    def mebibytes(self) -> dict[str, float]:
        """Return the largest peak of each kind of process so far, and of the `disk`."""
        return {name: kilobytes / 1024 for name, kilobytes in sorted(self._found.items())}

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of all processes while they were watched, those that have ended included."""
        return self._cpu / os.sysconf("SC_CLK_TCK")

    def _cpu_until_now(self) -> int:
        return sum(_ticks(process) for process in _named(self._roots))

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            for process, name in _named(self._roots).items():
                self._found[name] = max(self._found[name], _peak(process))
            self._found["disk"] = max(self._found["disk"], self._disk() // 1024)


def _named(roots: Mapping[int, str]) -> dict[int, str]:
    """Return the roots and their descendants by the names they are counted under."""
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    named = dict(roots)
    while new := {child for child, parent in parents.items() if parent in named and child not in named}:
        named |= {child: _program(child) for child in new}
    return named


def _parent(process: Path) -> int:
    return _facts(process)[1]


def _ticks(process: int) -> int:
    """Return the CPU time of a process and of its children that have ended."""
    return sum(_facts(Path(f"/proc/{process}"))[11:15])


def _facts(process: Path) -> list[int]:
    """Return what follows a process's name in its `stat` file, zeros if it has ended."""
    try:
        words = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return [0] * 50
    return [0, *map(int, words[1:])]


def _program(process: int) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    names = [Path(word.decode(errors="replace")).name for word in words if word and not word.startswith(b"-")]
    return next((name for name in names if not name.startswith("python")), "other")


def _peak(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
