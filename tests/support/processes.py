"""Studies in processes that may be killed: forked from one server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_PRELOADED = [
    "fedtune.simulation.runner",
    "fedtune.simulation.resolve",
    "fedtune_server.app",
    "fedtune_client.app",
    "hydra",
    "opacus",
    "peft",
    "transformers.models.bert.modeling_bert",
]


def start(words: Sequence[str]) -> ForkServerProcess:
    """Start one command line in a forked process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_command, args=(list(words),), daemon=True)
    process.start()
    return process


def kill_when(process: ForkServerProcess, moment: Callable[[], bool], *, after: float = 0.0) -> bool:
    """SIGKILL the process `after` seconds after `moment` is true; return False when it had ended before."""
    while process.is_alive() and not moment():
        time.sleep(0.001)
    time.sleep(after)
    alive = process.is_alive()
    if alive and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive and process.exitcode == -signal.SIGKILL


def lines_of(path: Path) -> int:
    """Return how many lines a file that is being written has now."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _command(words: list[str]) -> None:
    from fedtune.cli import main

    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        os._exit(main(words))
