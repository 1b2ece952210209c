"""Times a study's rounds by what its progress is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fedtune.simulation.progress import NullProgress, RoundInfo, StudyInfo


class RoundClock(NullProgress):
    """Notes how long each round took, everything between one round's end and the next included."""

    def __init__(self, sites: int) -> None:
        self._sites = sites
        self._began = self._ended = self._began_cpu = self._ended_cpu = 0.0
        self.seconds: list[float] = []
        self._inside = self._inside_cpu = 0.0

    def timed(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time is counted as training, so that the rest of the rounds can be told apart."""

        def timed_train(*arguments: Any) -> Any:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            result = train(*arguments)
            self._inside += time.perf_counter() - begin
            self._inside_cpu += time.process_time() - begin_cpu
            return result

        return timed_train

    def study_started(self, study: StudyInfo) -> None:  # noqa: ARG002 - Progress sets the signature
        """Start the clock."""
        self.start()

    def round_done(self, result: RoundInfo) -> None:
        """Note a round; one in which a site failed would measure something else."""
        if result.done != self._sites:
            raise RuntimeError(f"round {result.number}: {result.done} of {self._sites} sites; {dict(result.failed)}")
        self.lap()

    def start(self) -> None:
        """Begin the first round."""
        self._began = self._ended = time.perf_counter()
        self._began_cpu = self._ended_cpu = time.process_time()

    def lap(self) -> None:
        """End a round and begin the next."""
        now = time.perf_counter()
        self.seconds.append(now - self._ended)
        self._ended, self._ended_cpu = now, time.process_time()

    def parts(self, started: float) -> dict[str, Any]:
        """Return wall and CPU seconds before the first round, of the rounds, and after the last until now."""
        return {
            "startup": self._began - started,
            "rounds": self.seconds,
            "training": self._inside,
            "cpu_training": self._inside_cpu,
            "end": time.perf_counter() - self._ended,
            "cpu_startup": self._began_cpu,
            "cpu_rounds": self._ended_cpu - self._began_cpu,
            "cpu_end": time.process_time() - self._ended_cpu,
        }
