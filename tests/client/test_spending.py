"""What a site has spent survives everything: it is written before, never forgotten, and never counted too low."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import RunError
from fedtune.privacy.accounting import Event, epsilon, merge
from fedtune_client.spending import SpendingLog

SEEDED = Event(1.0, 0.1, 3, 0.5, noise="seeded")
SECURE = replace(SEEDED, noise="secure")


@pytest.fixture
def log(tmp_path: Path) -> SpendingLog:
    return SpendingLog(tmp_path / "sites" / "site-0" / "events.jsonl")


def steps(log: SpendingLog) -> int:
    return sum(event.steps for event in log.spent())


def test_a_reservation_is_on_disk_when_it_is_handed_out(log: SpendingLog) -> None:
    reserved = log.reserve(1, SEEDED)
    assert (reserved.round, reserved.event) == (1, SEEDED)
    line = json.loads(log.path.read_text())
    assert line == {"round": 1, "event": SEEDED.to_dict()}


def test_a_reservation_is_flushed_to_the_disk_and_not_to_a_buffer(
    log: SpendingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bytes] = []
    monkeypatch.setattr("os.fsync", lambda _descriptor: flushed.append(log.path.read_bytes()))
    log.reserve(1, SEEDED)
    assert b'"round": 1' in flushed[0]
    assert len(flushed) >= 2  # the file and the folder that names it


def test_nothing_is_written_without_privacy(log: SpendingLog) -> None:
    assert log.reserve(1, None).event is None
    assert not log.path.exists()
    assert log.spent() == ()


def test_a_seeded_round_that_is_repeated_counts_once(log: SpendingLog) -> None:
    for number in (1, 2, 2, 2, 3):
        log.reserve(number, SEEDED)
    assert steps(log) == 9


def test_every_attempt_with_secure_noise_counts(log: SpendingLog) -> None:
    for number in (1, 2, 2, 2, 3):
        log.reserve(number, SECURE)
    assert steps(log) == 15


def test_a_repeated_round_of_another_cost_counts_both(log: SpendingLog) -> None:
    log.reserve(1, SEEDED)
    log.reserve(1, replace(SEEDED, noise_multiplier=0.5))
    assert len(log.spent()) == 2


def test_seeded_and_secure_attempts_of_one_round_do_not_hide_each_other(log: SpendingLog) -> None:
    log.reserve(1, SECURE)
    log.reserve(1, SEEDED)
    log.reserve(1, SECURE)
    assert steps(log) == 9


@given(rounds=st.lists(st.integers(1, 5), max_size=12), noise=st.sampled_from([SEEDED, SECURE]))
def test_what_is_spent_is_never_below_the_distinct_rounds(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[int], noise: Event
) -> None:
    log = SpendingLog(tmp_path_factory.mktemp("log") / "events.jsonl")
    for number in rounds:
        log.reserve(number, noise)
    expected = rounds if noise is SECURE else set(rounds)
    assert log.spent() == merge([noise] * len(expected))


def test_two_sites_spend_apart(tmp_path: Path) -> None:
    one, other = SpendingLog(tmp_path / "a" / "events.jsonl"), SpendingLog(tmp_path / "b" / "events.jsonl")
    one.reserve(1, SEEDED)
    assert other.spent() == ()
    assert epsilon(one.spent(), 1e-5) > 0


def test_a_restarted_site_remembers(log: SpendingLog) -> None:
    log.reserve(1, SECURE)
    assert SpendingLog(Path(str(log.path))).spent() == log.spent()


# --- crashes and damage ---------------------------------------------------------------------------------------------


@given(cut=st.integers(1, 200))
def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """A line without its end was never confirmed, so its round was never trained."""
    log = SpendingLog(tmp_path_factory.mktemp("log") / "events.jsonl")
    log.reserve(1, SECURE)
    whole = log.path.read_bytes()
    log.reserve(2, SECURE)
    second = log.path.read_bytes()[len(whole) :]
    log.path.write_bytes(whole + second[: min(cut, len(second) - 1)])
    assert steps(log) == 3
    log.reserve(2, SECURE)
    assert log.path.read_bytes() == whole + second


@pytest.mark.parametrize(
    "line",
    ["{", "", "5", "[]", "{}", '{"round": 1}', '{"round": "x", "event": {}}', '{"round": 1, "event": {"steps": 1}}'],
)
def test_damage_before_the_last_line_stops_the_site(log: SpendingLog, line: str) -> None:
    log.reserve(1, SECURE)
    log.path.write_text(line + "\n" + log.path.read_text())
    before = log.path.read_bytes()
    with pytest.raises(RunError, match=r"run\.damaged") as caught:
        log.spent()
    assert caught.value.hint
    with pytest.raises(RunError, match=r"run\.damaged"):
        log.reserve(2, SECURE)
    assert log.path.read_bytes() == before


def test_an_event_that_cannot_be_is_damage_and_not_a_smaller_cost(log: SpendingLog) -> None:
    log.reserve(1, SECURE)
    log.path.write_text(log.path.read_text().replace('"sampling_rate": 0.1', '"sampling_rate": 0.0'))
    with pytest.raises(RunError, match=r"run\.damaged"):
        log.spent()
