"""The variables that every Flower process starts with: nothing is looked up outside and nothing installed at run time.

A child gets them through `flower_environment`; a process that is itself one of Flower's calls `enter` before it imports
Flower. Knows no process, no port and no file but Flower's home.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from fedtune.errors import TransportError
from fedtune.run.files import make_folder

SWITCHES: dict[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
}
_TALKATIVE = ("alembic", "sqlalchemy", "uvicorn")
_ASKED_ALL_THE_TIME = ("ControlServicer.ListRuns", "ControlServicer.ListNodes")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def flower_environment(home: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with Flower's switches set and its home in `home`.

    Every other variable of Flower's is dropped: some of them open further ports. A proxy stays for the way out, and
    never stands between two processes of one machine.
    """
    kept = {name: value for name, value in base.items() if not name.startswith("FLWR_")}
    direct = ",".join(filter(None, (base.get("NO_PROXY") or base.get("no_proxy", ""), *_LOOPBACK)))
    return kept | SWITCHES | {"FLWR_HOME": str(home), "NO_PROXY": direct, "no_proxy": direct}


def enter(home: Path) -> None:
    """Give this process Flower's environment; call it before Flower is imported. New files are its user's alone."""
    os.umask(0o077)
    make_folder(home)
    wanted = flower_environment(home, os.environ)
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)


def hold(folder: Path) -> int:
    """Make a folder this process's alone until the descriptor is closed or the process ends: `transport.in-use`."""
    make_folder(folder)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        hint = "stop the other process, or give this one a state folder of its own"
        raise TransportError("in-use", f"{folder} is in use by another process", hint=hint) from error
    return descriptor


def log_plainly() -> None:
    """Log Flower's lines as this process logs all others (`fedtune.processes.logs`): once, redacted, without colours.

    Imports Flower's logger, so `enter` comes before.
    """
    from flwr.supercore.logger import FLOWER_LOGGER

    FLOWER_LOGGER.handlers.clear()
    FLOWER_LOGGER.setLevel(logging.INFO)
    FLOWER_LOGGER.propagate = True
    FLOWER_LOGGER.addFilter(_says_something)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def _says_something(record: logging.LogRecord) -> bool:
    """Leave out empty lines, and one line for each look at runs and nodes, which happens every second or two."""
    text = record.getMessage().strip()
    return bool(text) and not text.startswith(_ASKED_ALL_THE_TIME)
