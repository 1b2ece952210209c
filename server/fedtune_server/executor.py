"""The coordinator's resident process: it runs the studies' ServerApps, one after another, and keeps the base model.

    python -m fedtune_server.executor SETTINGS.json

Nothing is opened before a study needs it. While the process works it touches `ready`, every few seconds, which holds
{"pid"}. SIGTERM ends it, and a study that is being run is told as `coordinator.stopped`, to go on later.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

from pydantic import Field

from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.config.schema import Section
from fedtune.flower import program
from fedtune.flower.environment import enter, log_plainly
from fedtune.processes.heartbeat import beat
from fedtune.run.files import write_whole
from fedtune_server.folder import ENVIRONMENT_VARIABLE as COORDINATOR

logger = logging.getLogger("fedtune.executor")


class CoordinatorExecutorSettings(Section):
    """Which coordinator's studies are run, and the private port of its SuperLink."""

    folder: Path
    port: int = Field(ge=1, lt=2**16)
    secret: Path
    ready: Path
    poll: float = Field(0.2, gt=0, le=30)


def serve(settings: CoordinatorExecutorSettings) -> None:
    """Serve until a signal ends it (SystemExit). Errors: those of `serve_coordinator`."""
    enter(settings.ready.parent / "executor-flower")
    log_plainly()
    settings.ready.unlink(missing_ok=True)
    os.environ[COORDINATOR] = str(settings.folder)
    os.environ.pop(MACHINE, None)  # a simulation's
    from fedtune.flower.executor import ExecutorSettings, serve_coordinator
    from fedtune_server.app import app

    logger.info("ready to run the studies in %s", settings.folder)
    write_whole(settings.ready, json.dumps({"pid": os.getpid()}).encode() + b"\n")
    beat(settings.ready)
    try:
        serve_coordinator(ExecutorSettings(settings.port, settings.secret, settings.poll), app)
    finally:
        settings.ready.unlink(missing_ok=True)


def main(words: list[str]) -> int:
    """Serve by a settings file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return program.run(CoordinatorExecutorSettings, serve, words, role="executor")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
