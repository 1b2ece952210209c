"""Progress of a study: what is told at which moment, and how it is shown as plain lines or not at all.

A caller tells a `Progress` what happened, in order: `study_started`, for each round `round_started`, any number of
`site_done` and `site_failed`, `round_done`, and at the end, also after an error or Ctrl-C, `study_done`; all from one
thread. Nothing here measures privacy, decides or stores; ε and metrics are shown as they are given. The table for
terminals is `fedtune.simulation.live`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

from fedtune.display import bytes_text, change_text, epsilon_text, metric_text, printable, seconds_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

named_failures = 5  # more failed sites than this are counted, not named


@dataclass(frozen=True, slots=True)
class StudyInfo:
    """What stays the same over the study; `sites` is how many are asked in a round, `delta` and ε are of one site."""

    name: str
    rounds: int
    sites: int
    epsilon_target: float | None
    delta: float | None
    metric_name: str
    not_private: bool
    not_for_release: bool
    run_dir: str
    one_unit: str = "one record"


@dataclass(frozen=True, slots=True)
class RoundInfo:
    """One finished round: `failed` maps a site to its error code; ε is the largest of any site's so far."""

    number: int
    asked: int
    done: int
    failed: Mapping[str, str] = field(default_factory=dict)
    epsilon_spent: float | None = None
    metric: float | None = None
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


class Progress(Protocol):
    """Who wants to know how a study goes; `number` counts rounds from 1."""

    def study_started(self, study: StudyInfo) -> None:
        """Begin; the first call."""

    def round_started(self, number: int, asked: int | None = None) -> None:
        """Note that a round was sent to `asked` sites (default: `StudyInfo.sites`)."""

    def site_done(self, name: str) -> None:
        """Note that a site's reply was accepted."""

    def site_failed(self, name: str, code: str) -> None:
        """Note that a site failed, or that its reply was refused."""

    def round_done(self, result: RoundInfo) -> None:
        """Note that a round was aggregated and evaluated."""

    def study_done(self) -> None:
        """End; may be called twice and without a beginning."""


class NullProgress:
    """Shows nothing."""

    def study_started(self, study: StudyInfo) -> None:
        """Show nothing."""

    def round_started(self, number: int, asked: int | None = None) -> None:
        """Show nothing."""

    def site_done(self, name: str) -> None:
        """Show nothing."""

    def site_failed(self, name: str, code: str) -> None:
        """Show nothing."""

    def round_done(self, result: RoundInfo) -> None:
        """Show nothing."""

    def study_done(self) -> None:
        """Show nothing."""


class PlainProgress(NullProgress):
    """One line a round, flushed, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._study: StudyInfo | None = None
        self._finished: list[RoundInfo] = []

    def study_started(self, study: StudyInfo) -> None:
        """Print what the study is, its promise and where its results go."""
        self._study = study
        self._line(f"{printable(study.name)}: {study.rounds} rounds, {study.sites} sites a round, {promise(study)}")
        self._line(f"run folder {printable(study.run_dir)}")

    def round_done(self, result: RoundInfo) -> None:
        """Print the round and its failed sites."""
        if self._study is None:
            return
        self._finished.append(result)
        self._line(round_line(self._study, self._finished))
        for line in failure_lines(result.failed):
            self._line(f"  {line}")

    def _line(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


def choose(stream: TextIO, output: Literal["text", "json"] | str) -> Progress:  # noqa: PYI051 - names the two values
    """`json`: nothing; a terminal: the live table; anything else: plain lines."""
    if output == "json":
        return NullProgress()
    from rich.console import Console

    from fedtune.simulation.live import LiveProgress

    console = Console(file=stream)
    return LiveProgress(console) if console.is_terminal and not console.is_dumb_terminal else PlainProgress(stream)


def promise(study: StudyInfo) -> str:
    """Say what the study promises to a privacy unit; NOT PRIVATE when it promises nothing."""
    if study.not_private:
        return "NOT PRIVATE (privacy.mode=off)"
    target = (
        "set by the noise multiplier" if study.epsilon_target is None else f"= {epsilon_text(study.epsilon_target)}"
    )
    delta = f" at δ = {study.delta:.3g}" if study.delta is not None else ""
    release = "; seeded noise: not for release" if study.not_for_release else ""
    return f"ε {target}{delta} for {printable(study.one_unit)}{release}"


def privacy_now(study: StudyInfo, finished: Sequence[RoundInfo]) -> str:
    """Say what is spent of the promise after the rounds that are finished."""
    if study.not_private:
        return "NOT PRIVATE"
    spent = [result.epsilon_spent for result in finished if result.epsilon_spent is not None]
    target = f" of {epsilon_text(study.epsilon_target)}" if study.epsilon_target is not None else ""
    return f"ε {epsilon_text(spent[-1] if spent else 0.0)}{target}"


def seconds_left(study: StudyInfo, finished: Sequence[RoundInfo]) -> float | None:
    """Estimate from the mean of the last rounds; None before the first."""
    if not finished:
        return None
    recent = finished[-10:]
    return sum(result.seconds for result in recent) / len(recent) * max(study.rounds - finished[-1].number, 0)


def round_line(study: StudyInfo, finished: Sequence[RoundInfo]) -> str:
    """Describe the last finished round in one line."""
    result = finished[-1]
    before = finished[-2].metric if len(finished) > 1 else None
    change = f" ({change_text(before, result.metric)})" if None not in {before, result.metric} else ""
    parts = [
        f"round {result.number:>{len(str(study.rounds))}}/{study.rounds}",
        f"sites {result.done}/{result.asked}",
        privacy_now(study, finished),
        f"{study.metric_name} {metric_text(result.metric)}{change}",
        f"up {bytes_text(result.bytes_up)}, down {bytes_text(result.bytes_down)}",
        f"{seconds_text(result.seconds)}, {seconds_text(seconds_left(study, finished) or 0)} left",
    ]
    return "  ".join(parts)


def failure_lines(failed: Mapping[str, str]) -> list[str]:
    """Name the first failed sites with their codes and count the others."""
    lines = [f"{printable(name)} failed: {printable(code)}" for name, code in list(failed.items())[:named_failures]]
    others = len(failed) - named_failures
    return lines + ([f"and {others} more sites failed"] if others > 0 else [])
