"""A child ends by itself when its supervisor is gone, also when that was killed and could say nothing.

The supervisor alone holds the writing end of a pipe, and writes nothing; every child gets the reading end. When the
supervisor dies, the kernel closes its end and a child reads the pipe's end. Nobody else can hold the writing end open:
descriptors are closed in children unless they are passed on, and only the reading end is. Knows no child by name.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
import threading
import time
from contextlib import suppress
from typing import Self

VARIABLE = "FEDTUNE_LIFELINE"
_PATIENCE = 10.0
logger = logging.getLogger("fedtune.lifeline")


class Lifeline:
    """The supervisor's pipe: open while the `with` block runs.

    A child is started with `pass_fds=line.pass_fds` and `line.variables` in its environment.
    """

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        os.close(self._write)

    @property
    def pass_fds(self) -> tuple[int]:
        """The descriptor that a child inherits."""
        return (self._read,)

    @property
    def variables(self) -> dict[str, str]:
        """What tells a child the descriptor."""
        return {VARIABLE: str(self._read)}


def watch(patience: float = _PATIENCE) -> bool:
    """End this process with SIGTERM when its supervisor is gone, and without more ado `patience` seconds later.

    Call it first of all in a child's main thread. The variable is taken out of the environment: this process's own
    children do not get the descriptor. Returns whether there is a supervisor to watch.
    """
    descriptor = _descriptor(os.environ.pop(VARIABLE, ""))
    if descriptor is None:
        return False
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_wait, args=(descriptor, patience), name="lifeline", daemon=True).start()
    return True


def _descriptor(text: str) -> int | None:
    """Return the descriptor, unless it is another thing than a pipe: a grandchild can inherit a variable alone."""
    if not text.isdecimal():
        return None
    with suppress(OSError, OverflowError):
        return int(text) if stat.S_ISFIFO(os.fstat(int(text)).st_mode) else None
    return None


def _wait(descriptor: int, patience: float) -> None:
    with suppress(OSError):
        os.read(descriptor, 1)
    logger.warning("the supervisor is gone; this process ends")
    # To the main thread, where Python runs handlers: it may sleep, and would not wake for a signal to another thread.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(patience)
    os._exit(1)
