"""Progress that acts: stops a study at a chosen moment, as Ctrl-C would, or does something in its run folder."""

from __future__ import annotations

from collections.abc import Callable

from fedtune.simulation.progress import NullProgress, RoundInfo, StudyInfo


class At(NullProgress):
    """Calls `act` once, at a moment such as `round_started 2`, `site_done site-001` or `round_done 3`."""

    def __init__(self, moment: str, act: Callable[[], None]) -> None:
        self._moment = moment
        self._act = act

    def study_started(self, study: StudyInfo) -> None:
        self._tell("study_started")

    def round_started(self, number: int, asked: int | None = None) -> None:
        self._tell(f"round_started {number}")

    def site_done(self, name: str) -> None:
        self._tell(f"site_done {name}")

    def round_done(self, result: RoundInfo) -> None:
        self._tell(f"round_done {result.number}")

    def _tell(self, moment: str) -> None:
        if moment == self._moment:
            self._moment = ""
            self._act()


def ctrl_c() -> None:
    """Do what Python does on SIGINT."""
    raise KeyboardInterrupt
