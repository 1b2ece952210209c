"""Failures that need a machine of their own: run as a program inside user, process, mount and network namespaces.

    unshare -Urnmpf --mount-proc --kill-child python -m tests.support.scenarios NAME FOLDER

Prints one JSON object of what happened. In the namespace this process may mount a small disk for the coordinator and
put a site behind a cable that can be cut; nothing outside sees either.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.chaos import SITES, Arena

COORDINATOR_HOST, SITE_HOST, CABLE = "10.77.0.1", "10.77.0.2", "cable0"
Scenario = Callable[[Path], dict[str, Any]]


def told(arena: Arena, **more: Any) -> dict[str, Any]:
    """Return what a scenario ends with: budgets are checked, and each round has everybody's part or a cause."""
    lines = [json.loads(line) for line in arena.study.metrics_file.read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, len(lines) + 1)), "a round was lost"
    summary = arena.study.summary()
    return {
        "rounds": len(lines),
        "finished": summary is not None,
        "failed": sum(len(line["failed"]) for line in lines),
        "causes": sorted({code for line in lines for code in line["failed"].values()}),
        "charged_again": arena.check_budgets(),
        "code": arena.deployment.attempts(arena.study).code,
        **more,
    }


def finish(arena: Arena, seconds: float = 400.0) -> None:
    arena.deployment.finished(arena.study, seconds)


def command(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def network(folder: Path, seconds: float) -> dict[str, Any]:
    """Cut one site off for a while, in the middle of a round."""
    command("mount", "-t", "tmpfs", "tmpfs", "/run")
    command("ip", "link", "set", "lo", "up")
    command("ip", "netns", "add", "site")
    command("ip", "link", "add", CABLE, "type", "veth", "peer", "name", "cable1", "netns", "site")
    command("ip", "address", "add", f"{COORDINATOR_HOST}/24", "dev", CABLE)
    command("ip", "link", "set", CABLE, "up")
    for words in (["address", "add", f"{SITE_HOST}/24", "dev", "cable1"], ["link", "set", "cable1", "up"]):
        command("ip", "-n", "site", *words)
    command("ip", "-n", "site", "link", "set", "lo", "up")
    wrap = {"mercy": ["ip", "netns", "exec", "site"]}
    arena = Arena.make(folder, seed=2, host=COORDINATOR_HOST, wrap=wrap, federation__rounds=12)
    arena.up()
    arena.wait_round(2, 300)
    command("ip", "link", "set", CABLE, "down")
    time.sleep(seconds)
    at = arena.round
    command("ip", "link", "set", CABLE, "up")
    back = arena.wait_round(at + 2, 300)
    finish(arena)
    arena.deployment.close()
    return told(arena, seconds_to_the_next_rounds=round(back, 1))


def disk_full(folder: Path) -> dict[str, Any]:
    """Fill the coordinator's disk for half a minute, and then make room again."""
    command("ip", "link", "set", "lo", "up")
    disk = folder / "coordinator"
    disk.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=48m,mode=0700", "tmpfs", str(disk))
    arena = Arena.make(folder, seed=3, federation__rounds=12)
    arena.up()
    arena.wait_round(2, 300)
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65_536))
        except OSError:
            pass
    full_at = arena.round
    time.sleep(40)
    reached = arena.round
    code = arena.deployment.attempts(arena.study).code
    ballast.unlink()
    finish(arena)
    arena.deployment.close()
    return told(arena, rounds_while_full=reached - full_at, code_while_full=code)


def older_state(folder: Path) -> dict[str, Any]:
    """Put the coordinator's folder back to a copy of some rounds before, and start it again."""
    arena = _started(folder, 4)
    arena.wait_round(3, 300)
    arena.deployment.end("server")
    kept = arena.round
    home, copy = arena.deployment.coordinator.path, folder / "copy"
    shutil.copytree(home, copy)
    arena.deployment.server_up()
    arena.wait_round(kept + 3, 300)
    arena.deployment.end("server")
    reached = arena.round
    shutil.rmtree(home)
    shutil.move(copy, home)
    arena.deployment.server_up()
    finish(arena)
    arena.deployment.close()
    return told(arena, put_back=reached - kept)


def coordinator_down(folder: Path, seconds: float) -> dict[str, Any]:
    """Kill the whole coordinator, and bring it back after a while."""
    arena = _started(folder, 5)
    arena.wait_round(3, 300)
    arena.deployment.kill("server", "up")
    time.sleep(seconds)
    at = arena.round
    arena.deployment.server_up()
    back = arena.wait_round(at + 2, 300)
    finish(arena)
    arena.deployment.close()
    return told(arena, seconds_to_the_next_rounds=round(back, 1))


def frozen(folder: Path, seconds: float) -> dict[str, Any]:
    """Freeze each process in turn for a while, and let it go on, if nobody has replaced it by then."""
    arena = _started(folder, 6, rounds=30)
    told_of: dict[str, float] = {}
    for role, process in (("mercy", "executor"), ("mercy", "node"), ("server", "link"), ("server", "executor")):
        arena.wait_round(arena.round + 1, 300)
        at, pid = arena.round, arena.deployment.kill(role, process, signal.SIGSTOP)
        time.sleep(seconds)
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGCONT)
        told_of[f"{role} {process}"] = round(arena.wait_round(at + 2, 300), 1)
    finish(arena)
    arena.deployment.close()
    return told(arena, seconds_to_the_next_rounds=told_of)


def _started(folder: Path, seed: int, rounds: int = 12) -> Arena:
    command("ip", "link", "set", "lo", "up")
    arena = Arena.make(folder, seed=seed, federation__rounds=rounds)
    arena.up()
    return arena


SCENARIOS: dict[str, Scenario] = {
    "network cut for 10 s": lambda folder: network(folder, 10),
    "network cut for 120 s": lambda folder: network(folder, 120),
    "disk full at the coordinator": disk_full,
    "older state copy at the coordinator": older_state,
    "coordinator down for 20 s": lambda folder: coordinator_down(folder, 20),
    "coordinator down for 10 min": lambda folder: coordinator_down(folder, 600),
    "processes frozen for 10 s": lambda folder: frozen(folder, 10),
    "processes frozen for 90 s": lambda folder: frozen(folder, 90),
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps({"sites": len(SITES), **SCENARIOS[sys.argv[1]](Path(sys.argv[2]))}) + "\n")
