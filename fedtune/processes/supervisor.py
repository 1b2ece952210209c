"""Starts the processes of a role, keeps them alive, and ends them: one loop that waits for none of them.

Children start in their order, each after the one before was ready for the first time; from then on each is started
again by itself, with back-off, as often as it ends. They end in the opposite order. Only a first start that ends with
exit code 2 (settings that cannot be used) ends the supervisor, with what the child said: waiting would change nothing.

Knows no Flower and no study; a role's own work is the `tick`.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fedtune.errors import FedtuneError
from fedtune.processes.backoff import Backoff
from fedtune.processes.child import Child, ChildSpec, ChildState
from fedtune.processes.lifeline import Lifeline

__all__ = ["ChildSpec", "ChildState", "Supervisor"]
_POLL = 0.05
_REMINDER = 60.0  # seconds between two lines about the same error
logger = logging.getLogger("fedtune.supervisor")


class Supervisor:
    """Keeps `children` alive while `run` runs."""

    def __init__(self, children: Sequence[ChildSpec], backoff: Backoff | None = None) -> None:
        self._children = [Child(spec, backoff or Backoff()) for spec in children]
        self._states = tuple(child.state for child in self._children)
        self._stopping = self._killing = False

    @property
    def states(self) -> tuple[ChildState, ...]:
        """The children as of a moment ago, in their order; any thread may ask."""
        return self._states

    def stop(self) -> None:
        """Let `run` end the children and return; a tick, a signal handler and any thread may call it."""
        self._stopping = True

    def run(self, tick: Callable[[], None] = lambda: None, *, every: float = 1.0) -> None:
        """Supervise until `stop`, SIGTERM, SIGINT or SIGHUP; a SIGINT while children end kills them at once.

        `tick` is called from the start on, every `every` seconds, whatever the children's states: it is expected to
        return soon and to look at `states` itself. What it raises is logged and ends nothing. Error:
        `process.not-started` after the other children were ended.
        """
        ticker = _Ticker(tick, every)
        with self._signals(), Lifeline() as lifeline:
            try:
                while not self._stopping:
                    self._go_on(lifeline)
                    ticker.go_on()
                    time.sleep(_POLL)
            finally:
                self._stopping = True
                self._end()

    def _go_on(self, lifeline: Lifeline) -> None:
        for child in self._children:
            child.go_on(lifeline)
            if not child.was_ready:
                break
        self._states = tuple(child.state for child in self._children)

    def _end(self) -> None:
        for child in reversed(self._children):
            child.stop(lambda: self._killing)
            self._states = tuple(child.state for child in self._children)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Listen to signals, where that is possible: Python gives them to the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: object) -> None:
        self._killing = self._killing or (self._stopping and number == signal.SIGINT)
        self._stopping = True


class _Ticker:
    """Calls a tick when it is due; an error is logged when it is a new one, and once a minute."""

    def __init__(self, tick: Callable[[], None], every: float) -> None:
        self._tick, self._every = tick, every
        self._due = self._told = time.monotonic()
        self._error = ""

    def go_on(self) -> None:
        if time.monotonic() < self._due:
            return
        try:
            self._tick()
            self._error = ""
        except Exception as error:  # noqa: BLE001 - no error of a role's work ends its processes
            self._tell(error)
        self._due = time.monotonic() + self._every

    def _tell(self, error: Exception) -> None:
        code = error.code if isinstance(error, FedtuneError) else type(error).__name__
        now = time.monotonic()
        if code == self._error and now - self._told < _REMINDER:
            return
        self._error, self._told = code, now
        known = {"code": code, "hint": error.hint} if isinstance(error, FedtuneError) else {}
        what = error.message if isinstance(error, FedtuneError) else "the supervisor's own work failed"
        logger.error("%s", what, exc_info=None if known else error, extra=known)
