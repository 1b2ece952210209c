from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from fedtune.simulation.live import LiveProgress
from fedtune.simulation.progress import NullProgress, PlainProgress, Progress, RoundInfo, StudyInfo, choose

study = StudyInfo(
    name="banks",
    rounds=10,
    sites=8,
    epsilon_target=8.0,
    delta=1e-5,
    metric_name="accuracy",
    not_private=False,
    not_for_release=True,
    run_dir="runs/banks/1",
)
not_private = dataclasses.replace(study, not_private=True, epsilon_target=None, delta=None)
first = RoundInfo(1, 8, 7, {"north": "message.bad-shape"}, 1.25, 0.5, 10.0, 2_000_000, 3_000_000)
second = RoundInfo(2, 8, 8, {}, 2.5, 0.625, 20.0, 2_000_000, 3_000_000)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(progress: Progress, told: StudyInfo) -> None:
    progress.study_started(told)
    for result in (first, second):
        progress.round_started(result.number)
        for index in range(result.done):
            progress.site_done(f"site-{index}")
        for name, code in result.failed.items():
            progress.site_failed(name, code)
        progress.round_done(result)
    progress.study_done()
    progress.study_done()


def plain(told: StudyInfo) -> list[str]:
    stream = io.StringIO()
    play(PlainProgress(stream), told)
    return stream.getvalue().splitlines()


def live(told: StudyInfo, *, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    play(LiveProgress(Console(file=stream, force_terminal=True, width=100)), told)
    stream.flush()
    stream.seek(0)
    return stream.read()


def test_plain_progress_is_one_line_a_round_with_everything_in_it() -> None:
    lines = plain(study)
    assert lines[0] == (
        "banks: 10 rounds, 8 sites a round, ε = 8.000 at δ = 1e-05 for one record; seeded noise: not for release"
    )
    assert lines[1:] == [
        "run folder runs/banks/1",
        "round  1/10  sites 7/8  ε 1.250 of 8.000  accuracy 0.5000  up 2.0 MB, down 3.0 MB  10.0 s, 1m30s left",
        "  north failed: message.bad-shape",
        (
            "round  2/10  sites 8/8  ε 2.500 of 8.000  accuracy 0.6250 (+0.1250)  up 2.0 MB, down 3.0 MB"
            "  20.0 s, 2m00s left"
        ),
    ]


def test_plain_lines_are_flushed_so_that_a_log_is_never_behind() -> None:
    class Stream(io.StringIO):
        unflushed = 0

        def write(self, text: str) -> int:
            self.unflushed += 1
            return super().write(text)

        def flush(self) -> None:
            self.unflushed = 0

    stream = Stream()
    progress = PlainProgress(stream)
    progress.study_started(study)
    progress.round_done(first)
    assert stream.unflushed == 0


@pytest.mark.parametrize("shown", [plain(not_private), live(not_private).splitlines()])
def test_a_study_without_privacy_says_so_in_its_heading_and_every_round(shown: list[str]) -> None:
    text = "\n".join(shown)
    assert text.count("NOT PRIVATE") >= 3
    assert "ε" not in text


def test_many_failed_sites_are_counted_instead_of_named() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.study_started(study)
    failed = {f"site-{index}": "data.empty" for index in range(30)}
    progress.round_done(dataclasses.replace(first, asked=30, done=0, failed=failed))
    assert stream.getvalue().count("failed: data.empty") == 5
    assert "and 25 more sites failed" in stream.getvalue()


def test_names_of_sites_cannot_command_the_terminal() -> None:
    result = dataclasses.replace(first, failed={"\x1b[2J[red]x": "data.empty"})
    for shown in (io.StringIO(), Terminal()):
        progress = choose(shown, "text")
        progress.study_started(study)
        progress.round_done(result)
        progress.study_done()
        assert "\\x1b[2J[red]x failed" in shown.getvalue()


def test_a_stream_that_cannot_write_greek_gets_a_replacement() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    play(PlainProgress(stream), study)
    assert "of 8.000" in stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]


def test_the_live_table_ends_with_the_last_round_and_gives_the_cursor_back() -> None:
    text = live(study)
    last = text[text.rindex("banks: ε") :]
    for part in ("2/10", "8 done, 0 failed of 8", "ε 2.500 of 8.000", "0.6250", "▁█", "2m00s left", "runs/banks/1"):
        assert part in last
    assert "round 1: north failed: message.bad-shape" in text
    assert text.endswith("\x1b[?25h")
    assert "▁" not in live(study, encoding="ascii")


def test_the_live_table_counts_sites_while_a_round_runs() -> None:
    stream = Terminal()
    progress = LiveProgress(Console(file=stream, force_terminal=True, width=100))
    progress.study_started(study)
    progress.round_started(3, asked=5)
    progress.site_done("a")
    progress.site_failed("b", "data.empty")
    progress.study_done()
    assert "1 done, 1 failed of 5" in stream.getvalue()
    assert "3/10" in stream.getvalue()


def test_a_noise_multiplier_instead_of_a_target_shows_what_is_spent() -> None:
    lines = plain(dataclasses.replace(study, epsilon_target=None, not_for_release=False))
    assert "ε set by the noise multiplier at δ = 1e-05 for one record" in lines[0]
    assert "ε 1.250  accuracy" in lines[2]


def test_progress_may_end_before_it_begins() -> None:
    for progress in (NullProgress(), PlainProgress(io.StringIO()), LiveProgress(Console(file=io.StringIO()))):
        progress.study_done()


def test_the_way_to_show_progress_follows_the_stream_and_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose(Terminal(), "text"), LiveProgress)
    assert isinstance(choose(io.StringIO(), "text"), PlainProgress)
    assert isinstance(choose(Terminal(), "json"), NullProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose(Terminal(), "text"), PlainProgress)
