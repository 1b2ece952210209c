"""Progress of a study as a table that redraws itself in a terminal. Knows only what `Progress` is told."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedtune.display import metric_text, printable, seconds_text, trend_text
from fedtune.simulation.progress import RoundInfo, StudyInfo, failure_lines, privacy_now, promise, seconds_left


class LiveProgress:
    """A table that redraws itself four times a second, for terminals."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._study: StudyInfo | None = None
        self._finished: list[RoundInfo] = []
        self._round = self._asked = self._done = self._failed = 0
        self._begin = time.monotonic()

    def study_started(self, study: StudyInfo) -> None:
        """Show the table."""
        self._study, self._begin = study, time.monotonic()
        self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=4)
        self._live.start()

    def round_started(self, number: int, asked: int | None = None) -> None:
        """Count sites from zero again."""
        self._round, self._done, self._failed = number, 0, 0
        self._asked = asked if asked is not None else (self._study.sites if self._study else 0)

    def site_done(self, name: str) -> None:  # noqa: ARG002 - the table counts, it does not name
        """Count a site."""
        self._done += 1

    def site_failed(self, name: str, code: str) -> None:  # noqa: ARG002 - named when the round is done
        """Count a failed site."""
        self._failed += 1

    def round_done(self, result: RoundInfo) -> None:
        """Take over the round's numbers; failed sites stay on the screen above the table."""
        self._finished.append(result)
        self._round, self._asked = result.number, result.asked
        self._done, self._failed = result.done, len(result.failed)
        for line in failure_lines(result.failed):
            self._console.print(Text(f"round {result.number}: {line}", style="yellow"))

    def study_done(self) -> None:
        """Leave the last table on the screen and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> Group:
        study = self._study
        if study is None:
            return Group()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, value in self._rows(study):
            table.add_row(name, value)
        style = "bold red" if study.not_private else "yellow" if study.not_for_release else "green"
        return Group(Text(f"{printable(study.name)}: {promise(study)}", style=style), table)

    def _rows(self, study: StudyInfo) -> list[tuple[str, Text]]:
        sites = f"{self._done} done, {self._failed} failed of {self._asked}"
        return [
            ("round", Text(f"{self._round}/{study.rounds}")),
            ("sites", Text(sites, style="yellow" if self._failed else "")),
            ("privacy", Text(privacy_now(study, self._finished), style="bold red" if study.not_private else "")),
            (study.metric_name, Text(self._metric())),
            ("time", Text(self._time(study))),
            ("run folder", Text(printable(study.run_dir), overflow="fold")),
        ]

    def _metric(self) -> str:
        values = [result.metric for result in self._finished if result.metric is not None]
        if not values:
            return "-"
        draws_bars = (self._console.encoding or "").lower().startswith("utf")
        return f"{metric_text(values[-1])}  {trend_text(values) if draws_bars else ''}".rstrip()

    def _time(self, study: StudyInfo) -> str:
        elapsed = seconds_text(time.monotonic() - self._begin)
        left = seconds_left(study, self._finished)
        return f"{elapsed} elapsed" + (f", about {seconds_text(left)} left" if left is not None else "")
