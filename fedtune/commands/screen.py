"""The console that commands print to, and how loud the libraries underneath may be."""

import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

plain_width = 110


def screen() -> "Console":
    """Return a console on stdout; of a fixed width where that is not a terminal, so that a log reads well."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else plain_width, highlight=False)


def quiet_libraries(*, verbose: bool) -> None:
    """Keep libraries' own progress bars and hints out of ours; call before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("fedtune").setLevel(logging.DEBUG)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("flwr").setLevel(logging.ERROR)
