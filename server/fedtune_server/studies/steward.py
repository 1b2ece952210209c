"""The coordinator's own work while it is up: conductor and registrar, kept in touch with the SuperLink of the moment.

Knows the two processes by their names and numbers, and starts neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from fedtune.errors import FedtuneError, TransportError
from fedtune.processes.supervisor import ChildState
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.studies.conductor import Conductor
from fedtune_server.studies.registrar import Registrar

if TYPE_CHECKING:
    from fedtune.flower.submission import Control

LINK, EXECUTOR = "link", "executor"


class Steward:
    """The coordinator's own work, once a second, in a thread of its own: a SuperLink can keep it waiting."""

    def __init__(self, folder: CoordinatorFolder, conductor: Conductor, registrar: Registrar) -> None:
        self._folder, self._conductor, self._registrar = folder, conductor, registrar
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="steward")
        self._running: Future[None] | None = None
        self._control: Control | None = None
        self._pids: dict[str, int | None] = {}

    @property
    def studies(self) -> Mapping[str, int]:
        """How many studies there are in each state."""
        return Counter(decision.state for decision in self._conductor.decisions.values())

    def tick(self, states: Sequence[ChildState]) -> None:
        """Begin the next look when the one before is over, and raise what that one has raised."""
        before = self._running
        if before is not None and not before.done():
            return
        self._running = self._pool.submit(self._look, {state.name: state for state in states})
        if before is not None:
            before.result()

    def close(self) -> None:
        """Begin nothing more, and do not wait for what has begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _look(self, states: Mapping[str, ChildState]) -> None:
        self._note_restarts(states)
        if states[LINK].status != "ready":
            return
        control = self._connected()
        try:
            _both(lambda: self._registrar.tick(control), lambda: self._conductor.tick(control))
        except TransportError:
            self._disconnect()
            raise

    def _note_restarts(self, states: Mapping[str, ChildState]) -> None:
        """Say to conductor and registrar which process is another one than before."""
        pids = {name: state.pid for name, state in states.items() if state.pid is not None}
        is_new = {name for name, pid in pids.items() if self._pids.get(name) not in {None, pid}}
        self._pids |= pids
        if LINK in is_new:
            self._disconnect()
            self._conductor.look_again()
            self._registrar.look_again()
        if EXECUTOR in is_new:
            self._conductor.executor_lost()

    def _connected(self) -> Control:
        from fedtune.flower.local_gate import read_secret
        from fedtune.flower.submission import Control

        if self._control is None:
            self._control = Control(self._folder.private_port(), read_secret(self._folder.secret))
        return self._control

    def _disconnect(self) -> None:
        if self._control is not None:
            self._control.__exit__(None, None, None)
            self._control = None


def _both(first: Callable[[], None], second: Callable[[], None]) -> None:
    """Do both, also when the first fails, and raise what went wrong."""
    failed: FedtuneError | None = None
    try:
        first()
    except FedtuneError as error:
        failed = error
    second()
    if failed is not None:
        raise failed
