"""A Flower process as a program, `python -m fedtune.flower.NAME SETTINGS.json`: errors end with code and hint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fedtune.errors import FedtuneError

logger = logging.getLogger("fedtune.program")
Settings = TypeVar("Settings", bound=BaseModel)


def run(settings: type[Settings], serve: Callable[[Settings], None], words: Sequence[str]) -> int:
    """Serve by the settings file that `words` name and return the exit code: 0, 2 for bad settings, or the error's."""
    try:
        serve(settings.model_validate_json(Path(words[0]).read_bytes()))
    except (ValidationError, OSError, IndexError) as error:
        logger.error("error[transport.settings]: the settings cannot be read: %s", type(error).__name__)  # noqa: TRY400
        return 2
    except FedtuneError as error:
        logger.error("error[%s]: %s; hint: %s", error.code, error.message, error.hint)  # noqa: TRY400
        return error.exit_code
    return 0
