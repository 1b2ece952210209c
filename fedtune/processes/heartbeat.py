"""A process that shows that it is alive by the time of its ready file: what stops for good, or was stopped, grows old.

A child calls `beat`, its supervisor `is_fresh`. Work in the main thread does not hold up the beat, SIGSTOP does.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

_BEAT = 5.0  # seconds
_MISSED = 4


def beat(ready: Path) -> None:
    """Touch a file every few seconds from now on, as long as this process runs; the file is made by the caller."""
    threading.Thread(target=_beat, args=(ready,), name="beat", daemon=True).start()


def is_fresh(ready: Path) -> bool:
    """Whether a file was touched lately. Raises OSError where there is none."""
    return time.time() - ready.stat().st_mtime < _MISSED * _BEAT


def _beat(ready: Path) -> None:
    while True:
        with suppress(OSError):
            os.utime(ready)
        time.sleep(_BEAT)
