"""How the newest attempt at a study ended: `outcome.json`, written in the ServerApp's process, read by the conductor.

Flower keeps a code of how a run ended; the message and the hint that a person needs stand here, because they name
places on this machine. Knows no rule about what happens next.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import httpx

from fedtune.config.schema import Section
from fedtune.errors import FedtuneError, RunError
from fedtune.journal.chain import moment
from fedtune.run.files import write_whole
from fedtune_server.studies.newest import newest_round

OUTCOME_FILE = "outcome.json"
_LOGS = "fedtune server logs --role executor"
_FULL = {errno.ENOSPC, errno.EDQUOT}
logger = logging.getLogger("fedtune.coordinator")


class Outcome(Section):
    """The end of one attempt: Flower's run number, `round` the last that is kept; the code is empty when it completed.

    `at` is a time in UTC.
    """

    run: int
    status: Literal["completed", "failed"]
    round: int
    at: str
    code: str = ""
    message: str = ""
    hint: str = ""


@contextmanager
def recorded(folder: Path, run: int) -> Iterator[None]:
    """Write down how an attempt ended, whatever ends it; `run` is Flower's number (`Context.run_id`).

    What the block raises goes on; a disk that takes no `outcome.json` is only logged.
    """
    try:
        yield
    except BaseException as error:
        write_outcome(folder, run, error)
        raise
    write_outcome(folder, run)


def write_outcome(folder: Path, run: int, error: BaseException | None = None) -> None:
    """Write `outcome.json`: completed, or failed with an error's code, message and hint."""
    code, message, hint = ("", "", "") if error is None else described(error)
    outcome = Outcome(
        run=run,
        status="completed" if error is None else "failed",
        round=newest_round(folder),
        at=moment(datetime.now(UTC)),
        code=code,
        message=message,
        hint=hint,
    )
    try:
        write_whole(folder / OUTCOME_FILE, (outcome.model_dump_json(indent=2) + "\n").encode())
    except RunError as failed:
        logger.warning("the study's end could not be written down: %s", failed.code)


def read_outcome(folder: Path) -> Outcome | None:
    """Return how the newest attempt ended, or None where nothing readable says so: Flower's code has to do then."""
    try:
        return Outcome.model_validate_json((folder / OUTCOME_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def described(error: BaseException) -> tuple[str, str, str]:
    """Return code, message and hint of whatever ended an attempt.

    The text of an exception that is not the project's own stays in the log: it can quote a record of the test file.
    """
    if isinstance(error, FedtuneError):
        return error.code, error.message, error.hint
    name = type(error).__name__
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return "coordinator.stopped", "the executor was stopped", "it is started again by: fedtune server up"
    if isinstance(error, OSError) and error.errno in _FULL:
        return (
            "run.disk-full",
            "no space left on the coordinator's disk",
            "free some space; the study goes on by itself",
        )
    if isinstance(error, httpx.HTTPError) or type(error).__module__.startswith("flwr."):
        return "transport.lost-link", f"the SuperLink no longer answers ({name})", "fedtune server logs --role link"
    return "coordinator.internal", f"a fault of fedtune or of this machine ({name})", _LOGS
