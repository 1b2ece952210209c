"""Times a study's rounds by what its progress is told."""

from __future__ import annotations

import time

from fedtune.simulation.progress import NullProgress, RoundInfo, StudyInfo


class RoundClock(NullProgress):
    """Notes how long each round took, everything between one round's end and the next included."""

    def __init__(self, sites: int) -> None:
        self._sites = sites
        self.began = self.ended = 0.0
        self.seconds: list[float] = []

    def study_started(self, study: StudyInfo) -> None:
        """Start the clock."""
        self.began = self.ended = time.perf_counter()

    def round_done(self, result: RoundInfo) -> None:
        """Note a round; one in which a site failed would measure something else."""
        if result.done != self._sites:
            raise RuntimeError(f"round {result.number}: {result.done} of {self._sites} sites; {dict(result.failed)}")
        now = time.perf_counter()
        self.seconds.append(now - self.ended)
        self.ended = now
