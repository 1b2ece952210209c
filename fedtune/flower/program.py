"""A role's process as a program, `python -m MODULE SETTINGS.json`: it ends with its supervisor, errors end with a code.

Exit codes: 0, 2 for settings that cannot be used, or the error's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedtune.errors import FedtuneError, TransportError
from fedtune.processes import lifeline, logs

logger = logging.getLogger("fedtune.program")
Settings = TypeVar("Settings", bound=BaseModel)


def run(settings: type[Settings], serve: Callable[[Settings], None], words: Sequence[str], *, role: str) -> int:
    """Serve by the settings file that `words` name, logging as `role`, and return the exit code."""
    lifeline.watch()
    try:
        logs.setup(role)
        serve(_read(settings, words))
    except FedtuneError as error:
        logger.error("%s", error.message, extra={"code": error.code, "hint": error.hint})  # noqa: TRY400
        return error.exit_code
    return 0


def _read(settings: type[Settings], words: Sequence[str]) -> Settings:
    try:
        return settings.model_validate_json(Path(words[0]).read_bytes())
    except (ValidationError, OSError, IndexError) as error:
        wrong = error.title if isinstance(error, ValidationError) else type(error).__name__
        hint = "the command that starts this process writes them"
        raise TransportError("settings", f"the settings cannot be read: {wrong}", hint=hint) from error
