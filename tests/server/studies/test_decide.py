"""What comes next for a study, for every way in which an attempt can end."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.flower.submission import RunFacts
from fedtune.journal.chain import moment
from fedtune_server.studies.decide import Seen, decide, is_final, is_passing, judge, pause
from fedtune_server.studies.outcome_file import Outcome
from fedtune_server.studies.record import Attempts, StudyRecord
from tests.server.studies.conftest import START

PASSING = (
    "federation.no-quorum",
    "federation.engine-died",
    "coordinator.stopped",
    "coordinator.lost",
    "transport.lost-link",
    "transport.task-taken",
    "envelope.busy",
    "envelope.disk-full",
    "run.disk-full",
    "run.unwritable",
    "run.in-use",
)
FINAL = (
    "federation.other-data",
    "model.other-base",
    "study.unknown",
    "witness.other-key",
    "config.bad-plan",
    "run.damaged",
)
RECORD = StudyRecord(plan_sha256="0" * 64, name="study", sites=("a",), submitted=moment(START))


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def run_of(
    number: int, status: str = "finished", outcome: str = "failed", details: str = "", when: float = 0
) -> RunFacts:
    ended = at(when).isoformat() if status == "finished" else ""
    return RunFacts(number, "b", status, outcome, details, at(number).isoformat(), ended)


def failed(number: int, code: str, when: float = 0) -> RunFacts:
    return run_of(number, details=code, when=when)


@pytest.mark.parametrize("code", PASSING)
def test_what_passes_is_tried_again_with_growing_pauses_for_ever(code: str) -> None:
    attempts, pauses = Attempts(), []
    for number in range(1, 40):
        now = at(1000 * number)
        seen = Seen(RECORD, attempts, [failed(number, code, 1000 * number)])
        attempts = judge(seen, now)
        decision = decide(replace(seen, attempts=attempts), now, START)
        assert decision.state == "waiting"
        assert decision.until is not None
        pauses.append((decision.until - now).total_seconds())
        assert decide(replace(seen, attempts=attempts), decision.until, START).state == "queued"
    assert pauses[:7] == [5, 10, 20, 40, 80, 160, 300]
    assert set(pauses[7:]) == {300}
    assert is_passing(code)


@pytest.mark.parametrize("code", FINAL)
def test_what_does_not_pass_waits_for_a_person(code: str) -> None:
    seen = Seen(RECORD, Attempts(), [failed(1, code)])
    attempts = judge(seen, START)
    assert decide(replace(seen, attempts=attempts), at(10**9), at(10**8)).state == "failed"
    resumed = replace(seen, record=RECORD.model_copy(update={"resumed": 1}), attempts=attempts)
    again = judge(resumed, at(5))
    assert decide(replace(resumed, attempts=again), at(5), START).state == "queued"
    assert again.failures == 0


def test_a_fault_is_tried_five_times_without_a_new_round_and_each_round_begins_the_count_anew() -> None:
    attempts = Attempts()
    for number in range(1, 5):
        attempts = judge(Seen(RECORD, attempts, [failed(number, "coordinator.internal")]), START)
        assert not is_final(attempts)
    fresh = judge(Seen(RECORD, attempts, [failed(5, "coordinator.internal")], round=3), START)
    assert (fresh.failures, fresh.faults, fresh.round) == (1, 1, 3)
    assert is_final(judge(Seen(RECORD, attempts, [failed(5, "coordinator.internal")]), START))


def test_an_attempt_is_counted_once_and_never_again_when_flower_remembers_an_older_state() -> None:
    first, second = failed(1, "run.disk-full"), failed(2, "run.disk-full")
    once = judge(Seen(RECORD, Attempts(), [first]), START)
    assert judge(Seen(RECORD, once, [first]), at(1)) is once
    twice = judge(Seen(RECORD, once, [second, first]), at(2))
    assert twice.failures == 2
    assert judge(Seen(RECORD, twice, [first]), at(3)) is twice
    assert judge(Seen(RECORD, twice, []), at(3)) is twice


def test_a_run_that_somebody_has_stopped_is_no_failure_and_one_without_its_executor_is() -> None:
    stopped = run_of(1, outcome="stopped")
    assert judge(Seen(RECORD, Attempts(), [stopped]), START).failures == 0
    found = judge(Seen(RECORD, Attempts(), [stopped], orphans={1}), START)
    assert (found.failures, found.code) == (1, "coordinator.lost")


def test_the_words_of_the_attempt_itself_are_kept_if_they_are_of_this_run() -> None:
    told = Outcome(run=1, status="failed", round=2, at=moment(START), code="model.other-base", message="m", hint="h")
    found = judge(Seen(RECORD, Attempts(), [failed(1, "coordinator.internal")], told), START)
    assert (found.code, found.message, found.hint) == ("model.other-base", "m", "h")
    other = judge(Seen(RECORD, Attempts(), [failed(2, "run.disk-full")], told), START)
    assert other.code == "run.disk-full"


@pytest.mark.parametrize("details", ["", "Task heartbeat timed out", "No heartbeat."])
def test_a_run_that_flower_gave_up_without_a_word_of_ours_was_lost(details: str) -> None:
    found = judge(Seen(RECORD, Attempts(), [failed(1, details)]), START)
    assert found.code == "coordinator.lost"


def test_an_attempt_that_completed_without_a_summary_is_a_fault() -> None:
    found = judge(Seen(RECORD, Attempts(), [run_of(1, outcome="completed")]), START)
    assert (found.code, found.faults) == ("coordinator.internal", 1)


def test_a_summary_ends_a_study_whatever_flower_says() -> None:
    seen = Seen(RECORD, Attempts(), [failed(1, "coordinator.internal")], is_finished=True)
    assert judge(seen, START) is seen.attempts
    assert decide(seen, START, START).state == "done"


def test_a_wish_to_stop_stops_every_active_run_and_holds_without_any() -> None:
    record = RECORD.model_copy(update={"wish": "stop"})
    seen = Seen(record, Attempts(), [run_of(2, "pending"), run_of(1, "running")])
    assert decide(seen, START, START).stop == (2, 1)
    assert decide(seen, START, START).state == "stopping"
    assert decide(Seen(record, Attempts()), START, START).state == "stopped"


def test_of_two_active_runs_the_one_that_has_begun_goes_on() -> None:
    seen = Seen(RECORD, Attempts(), [run_of(3, "pending"), run_of(2, "running"), run_of(1, "pending")])
    decision = decide(seen, START, START)
    assert (decision.state, decision.stop) == ("running", (3, 1))


def test_a_coordinator_that_was_started_after_a_failure_does_not_wait_for_its_pause() -> None:
    seen = Seen(RECORD, Attempts(), [failed(1, "run.disk-full", 10)])
    waiting = replace(seen, attempts=judge(seen, at(10)))
    assert decide(waiting, at(11), START).state == "waiting"
    assert decide(waiting, at(11), up_since=at(11)).state == "queued"


def test_a_clock_that_is_set_back_makes_nobody_wait() -> None:
    seen = Seen(RECORD, Attempts(), [failed(1, "run.disk-full", 10)])
    waiting = replace(seen, attempts=judge(seen, at(10)))
    assert decide(waiting, at(-1000), at(-2000)).state == "queued"


def test_a_release_ends_the_run_that_does_not_know_of_it_and_only_that() -> None:
    record = RECORD.model_copy(update={"released": ("a",), "resumed": 1})
    seen = Seen(record, Attempts(resumed=1), [run_of(1, "running")])
    assert judge(seen, START) is seen.attempts
    assert decide(seen, START, START).stop == (1,)
    after = replace(seen, runs=[run_of(1, outcome="stopped")])
    known = judge(after, START)
    assert decide(replace(after, attempts=known), START, START).state == "queued"
    assert decide(Seen(record, known, [run_of(2, "running")]), START, START).stop == ()


runs = st.builds(
    run_of,
    st.integers(1, 6),
    st.sampled_from(["pending", "starting", "running", "finished"]),
    st.sampled_from(["failed", "stopped", "completed"]),
    st.sampled_from(["", *PASSING, *FINAL]),
    st.integers(-100, 100),
)
seen_ever = st.builds(
    Seen,
    st.builds(
        lambda wish, resumed: RECORD.model_copy(update={"wish": wish, "resumed": resumed}),
        st.sampled_from(["run", "stop"]),
        st.integers(0, 2),
    ),
    st.builds(Attempts, resumed=st.integers(0, 2), run=st.integers(0, 6), round=st.integers(0, 3)),
    st.lists(runs, max_size=4, unique_by=lambda run: run.number).map(
        lambda found: sorted(found, key=lambda run: -run.number)
    ),
    st.none(),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)


@given(seen_ever, st.integers(-100, 1000))
def test_at_most_one_run_of_a_study_ever_goes_on(seen: Seen, seconds: int) -> None:
    now = at(seconds)
    attempts = judge(seen, now)
    decision = decide(replace(seen, attempts=attempts), now, START)
    active = {run.number for run in seen.runs if run.status != "finished"}
    assert set(decision.stop) <= active
    begun = {run.number for run in seen.runs if run.status in {"starting", "running"}}
    if decision.state not in {"done", "stopping"}:
        assert len(active - set(decision.stop)) <= 1
    if decision.state == "queued":
        assert not active
        assert not seen.is_finished
        assert seen.record.wish == "run"
    if decision.state == "stopping":
        assert begun <= set(decision.stop) or seen.record.wish == "stop"
    assert judge(replace(seen, attempts=attempts), now) == attempts, "judging twice is judging once"


@given(st.integers(1, 10**6))
def test_pauses_stay_between_five_seconds_and_five_minutes(failures: int) -> None:
    assert 5 <= pause(failures) <= 300
