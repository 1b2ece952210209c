"""Facts of one machine: where records, base model and run folder are, and what computes. Never part of a plan.

A simulation writes them to `machine.json` in its run folder and names that file in an environment variable, so that
processes started by an engine (Ray's actors) find it too.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from fedtune.config.schema import Section
from fedtune.errors import RunError

ENVIRONMENT_VARIABLE = "FEDTUNE_MACHINE"
_REAL = ("FEDTUNE_SITE", "FEDTUNE_COORDINATOR")


class Machine(Section):
    """What this machine knows and no message carries."""

    run_dir: str
    model_folder: str
    data_path: str | None = None
    test_path: str | None = None
    data_format: str = "auto"
    allow_download: bool = False
    device: str = "cpu"
    threads: int = 1
    backend: str = "inprocess"
    workers: int = 1

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.run_dir)

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read the facts of a run folder."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError("no-machine", f"{path} cannot be read as machine facts", hint="name a run folder") from error


def announce(path: Path) -> None:
    """Make a `machine.json` the one this process and its children use: they are parts of a simulation from now on.

    An operator who has exported a real site's or coordinator's folder does not mean that folder with it.
    """
    for name in _REAL:
        os.environ.pop(name, None)
    os.environ[ENVIRONMENT_VARIABLE] = str(path.resolve())


def current() -> Machine:
    """Return the announced machine facts."""
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if path is None:
        raise RunError("no-machine", f"{ENVIRONMENT_VARIABLE} is not set", hint="start with `fedtune simulate`")
    return _load_once(path)


@lru_cache(maxsize=8)
def _load_once(path: str) -> Machine:
    return Machine.load(Path(path))
