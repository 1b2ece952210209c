"""How long a process has not answered: asks in a thread of its own, because an answer can fail to come at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

_STEP = 1.0  # seconds; time in which this process itself was stopped is not held against the other one


class Silence:
    """Calls `probe` every `every` seconds until `close`; whatever it raises is no answer."""

    def __init__(self, probe: Callable[[], bool], every: float) -> None:
        self._probe, self._every = probe, every
        self._answered, self._closed = threading.Event(), threading.Event()
        self._seconds = 0.0
        threading.Thread(target=self._ask, name="probe", daemon=True).start()

    def after(self, passed: float) -> float:
        """Return the seconds without an answer, given those that have passed since this was last asked."""
        if self._answered.is_set():
            self._answered.clear()
            self._seconds = 0.0
        else:
            self._seconds += min(passed, _STEP)
        return self._seconds

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()

    def _ask(self) -> None:
        while not self._closed.is_set():
            with suppress(Exception):
                if self._probe():
                    self._answered.set()
            self._closed.wait(self._every)
