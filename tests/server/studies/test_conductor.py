"""Studies that are started, resumed and stopped by what stands in their folders, over deaths of everybody."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest

from fedtune.errors import FederationError, ModelError
from fedtune.flower.bundle import build
from fedtune_server.studies.outcome_file import write_outcome
from fedtune_server.studies.record import ATTEMPTS_FILE, RECORD_FILE, read_attempts
from tests.server.studies.conftest import World, keep_round, plan_of


def test_a_submitted_study_is_started_with_its_plans_bundle_and_left_alone_until_it_is_done(world: World) -> None:
    study = world.submit()
    run = world.begun()
    assert world.link.of(run).bundle_sha256 == build(plan_of().json_text).sha256
    world.tick(120)
    assert world.state(study) == "running"
    (study.path / "summary.json").write_text("{}")
    world.link.end(run, outcome="completed")
    world.tick(5)
    assert world.state(study) == "done"
    assert len(world.link.known) == 1


def test_studies_run_one_at_a_time_in_the_order_of_their_submission(world: World) -> None:
    studies = [world.submit(name) for name in ("zebra", "ant", "mole")]
    order = []
    for _ in studies:
        run = world.begun()
        world.tick(3)
        assert world.link.active == [run]
        order.append(world.link.of(run).bundle_sha256)
        study = next(study for study in studies if study.bundle_sha256 == order[-1])
        (study.path / "summary.json").write_text("{}")
        world.link.end(run, outcome="completed")
        world.tick(3)
    assert order == [study.bundle_sha256 for study in studies]


def test_a_study_that_waits_or_has_failed_holds_up_no_other(world: World) -> None:
    first, second, third = (world.submit(name) for name in ("one", "two", "three"))
    run = world.begun()
    write_outcome(first.path, run, ModelError("other-base", "it is another", hint="fetch it"))
    world.link.end(run, "model.other-base")
    run = world.begun()
    assert world.link.of(run).bundle_sha256 == second.bundle_sha256
    world.link.end(run, "federation.no-quorum")
    run = world.begun()
    assert world.link.of(run).bundle_sha256 == third.bundle_sha256
    assert (world.state(first), world.state(second)) == ("failed", "waiting")


def test_a_waiting_study_is_tried_again_when_its_pause_is_over_and_not_before(world: World) -> None:
    study = world.submit()
    world.link.end(world.begun(), "federation.no-quorum")
    world.tick(5)
    assert world.state(study) == "waiting"
    assert not world.link.active
    world.tick(4)
    assert world.state(study) in {"starting", "running"}


def test_attempts_outlive_the_coordinator_and_a_start_of_it_tries_at_once(world: World) -> None:
    study = world.submit()
    for _ in range(3):
        world.link.end(world.begun(), "run.disk-full")
        world.tick(30)
    assert read_attempts(study.path).failures == 3
    world.link.end(world.link.active[0], "run.disk-full")
    world.tick(3)
    assert world.state(study) == "waiting"
    world.restart()
    world.tick(2)
    assert world.state(study) == "starting"
    assert read_attempts(study.path).failures == 4


def test_a_failed_study_stays_failed_over_restarts_until_a_person_resumes_it(world: World) -> None:
    study = world.submit()
    run = world.begun()
    write_outcome(study.path, run, FederationError("other-data", "other records", hint="begin anew"))
    world.link.end(run, "federation.other-data")
    for _ in range(3):
        world.tick(400)
        assert world.state(study) == "failed"
        world.restart()
    assert read_attempts(study.path).message == "other records"
    world.store.resume(study)
    world.tick()
    assert world.state(study) == "starting"


def test_a_coordinator_that_was_killed_takes_its_runs_for_lost_at_once_and_counts_no_failure(world: World) -> None:
    study = world.submit()
    run = world.begun()
    keep_round(study.path, 2)
    world.restart()
    world.tick(2)
    assert world.link.of(run).outcome == "stopped"
    assert len(world.link.active) == 1
    assert read_attempts(study.path).failures == 0


def test_an_executor_that_dies_again_and_again_is_given_longer_pauses(world: World) -> None:
    study = world.submit()
    for number in range(1, 5):
        world.begun()
        world.conductor.executor_lost()
        world.tick(2)
        assert read_attempts(study.path).failures == number
        assert read_attempts(study.path).code == "coordinator.lost"
        world.tick(5 * 2**number)
        if world.link.active:
            world.link.begin(world.link.active[0])


def test_a_superlink_that_has_forgotten_everything_gets_the_run_again(world: World) -> None:
    study = world.submit()
    world.begun()
    world.link.known.clear()
    world.conductor.look_again()
    world.tick()
    assert world.state(study) == "starting"
    assert len(world.link.active) == 1


def test_stop_and_resume_hold_and_let_go(world: World) -> None:
    study = world.submit()
    run = world.begun()
    world.store.stop(study)
    world.tick(2)
    assert world.link.of(run).outcome == "stopped"
    assert world.state(study) == "stopped"
    world.restart()
    world.tick(400)
    assert not world.link.active
    world.store.resume(study)
    world.tick()
    assert world.state(study) == "starting"
    assert read_attempts(study.path).failures == 0


def test_a_released_site_ends_the_run_that_has_it_in_quarantine(world: World) -> None:
    study = world.submit()
    run = world.begun()
    world.store.resume(study, ["b"])
    world.tick(2)
    assert world.link.of(run).outcome == "stopped"
    (again,) = world.link.active
    world.link.begin(again)
    world.tick(10)
    assert world.link.active == [again]


def test_runs_that_belong_to_no_study_and_second_runs_are_stopped(world: World) -> None:
    study = world.submit()
    run = world.begun()
    second = world.link.add(study.bundle_sha256)
    stranger = world.link.add("f" * 64, "running")
    world.tick(4)
    assert world.link.active == [run]
    assert {world.link.of(number).outcome for number in (second, stranger)} == {"stopped"}


@pytest.mark.parametrize(
    ("name", "raw"), [(RECORD_FILE, b"{"), (RECORD_FILE, b"[]"), ("plan.json", b"{}"), ("plan.json", b"\xff")]
)
def test_a_damaged_study_is_named_and_the_others_go_on(
    world: World, name: str, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = world.submit("broken"), world.submit("whole")
    (broken.path / name).write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        world.tick(5)
    assert world.state(whole) == "starting"
    assert broken.path not in world.conductor.decisions
    told = [line for line in caplog.messages if broken.path.name in line]
    assert len(told) == 1, "it is said once"
    assert "[study.damaged]" in told[0]


def test_attempts_that_cannot_be_read_or_written_keep_no_study_from_running(world: World, tmp_path: Path) -> None:
    study = world.submit()
    (study.path / ATTEMPTS_FILE).write_text("{")
    run = world.begun()
    (study.path / ATTEMPTS_FILE).unlink()
    (study.path / ATTEMPTS_FILE).mkdir()
    world.link.end(run, "run.disk-full")
    world.tick(4)
    assert world.state(study) == "waiting", "the pause holds although nothing could be written down"
    (study.path / ATTEMPTS_FILE).rmdir()
    world.tick(6)
    assert json.loads((study.path / ATTEMPTS_FILE).read_text())["failures"] == 1


def test_a_study_that_was_taken_away_and_submitted_anew_owes_nothing_to_its_earlier_runs(world: World) -> None:
    study = world.submit()
    world.link.end(world.begun(), "model.other-base")
    world.tick(3)
    assert world.state(study) == "failed"
    shutil.rmtree(study.path)
    world.tick(2)
    again = world.submit()
    world.tick()
    assert world.state(again) == "starting"


def test_nothing_is_asked_of_flower_while_nothing_is_to_be_done(world: World) -> None:
    world.submit()
    (world.store.read().studies[0].path / "summary.json").write_text("{}")
    world.tick(2)
    before = world.link.calls
    world.tick(60)
    assert world.link.calls - before <= 2
    second = world.submit("second")
    world.tick()
    assert world.state(second) == "starting"


@pytest.mark.parametrize("seed", range(15))
def test_every_study_ends_whatever_dies_and_never_has_two_runs(world: World, seed: int) -> None:
    """Deaths at random: of runs, executor, SuperLink and coordinator; each attempt keeps a round or none."""
    dice = random.Random(seed)
    studies = [world.submit(name) for name in ("one", "two")]
    by_bundle = {study.bundle_sha256: study for study in studies}
    kept = dict.fromkeys(by_bundle, 0)
    for _ in range(4000):
        if all((study.path / "summary.json").exists() for study in studies):
            break
        world.tick()
        assert len(world.link.active) <= 1
        for number in world.link.active:
            bundle = world.link.of(number).bundle_sha256
            world.link.begin(number)
            if dice.random() < 0.3:
                kept[bundle] += 1
                keep_round(by_bundle[bundle].path, kept[bundle])
            if kept[bundle] >= 5:
                (by_bundle[bundle].path / "summary.json").write_text("{}")
                world.link.end(number, outcome="completed")
            elif dice.random() < 0.2:
                world.link.end(number, dice.choice(["", "federation.no-quorum", "coordinator.stopped"]))
        match dice.randrange(40):
            case 0:
                world.restart()
            case 1:
                world.conductor.executor_lost()
            case 2:
                world.link.known = [run for run in world.link.known if run.status == "finished"][:-1]
                world.conductor.look_again()
    assert all((study.path / "summary.json").exists() for study in studies)
