"""A supervisor that runs in a thread, and logging that is put back after each test."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.processes.supervisor import Supervisor
from tests.support.children import Place, wait_for


class Running:
    """A supervisor that runs in a thread."""

    def __init__(self, supervisor: Supervisor, tick: Callable[[], None], every: float) -> None:
        self.supervisor = supervisor
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(tick, every))
        self._thread.start()

    def state(self, name: str) -> Any:
        return next(state for state in self.supervisor.states if state.name == name)

    def until(self, name: str, status: str, seconds: float = 10.0) -> Any:
        return wait_for(lambda: (found := self.state(name)).status == status and found, seconds)

    def end(self) -> None:
        self.supervisor.stop()
        self.join()

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self, tick: Callable[[], None], every: float) -> None:
        try:
            self.supervisor.run(tick, every=every)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error


Supervise = Callable[..., Running]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def supervise() -> Iterator[Supervise]:
    running: list[Running] = []

    def start(supervisor: Supervisor, tick: Callable[[], None] = lambda: None, every: float = 0.1) -> Running:
        running.append(Running(supervisor, tick, every))
        return running[-1]

    yield start
    for each in running:
        each.end()


@pytest.fixture
def _plain_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("FEDTUNE_LOG_FORMAT", "FEDTUNE_LOG_FOLDER", "FEDTUNE_LOG_TRACEBACKS"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    hooks = sys.excepthook, threading.excepthook
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising
    logging.captureWarnings(capture=False)
    logging.getLogger("fedtune").setLevel(logging.NOTSET)
    sys.excepthook, threading.excepthook = hooks
