"""What a person is told of a study, from its files alone and with a coordinator that is up."""

from __future__ import annotations

import numpy as np

from fedtune.aggregation.lora.protocol import ServerState
from fedtune.aggregation.server_optimizers import OptimizerState
from fedtune.simulation.observer import study_info
from fedtune.simulation.progress import RoundInfo
from fedtune_server.checkpoint import Checkpoint, save_checkpoint
from fedtune_server.facts import SiteFacts, StudyFacts
from fedtune_server.studies.progress_file import FileProgress
from fedtune_server.studies.report import StudyReport, Surroundings, report
from fedtune_server.studies.store import StoredStudy
from tests.server.studies.conftest import SITES, World


def seen(world: World, study: StoredStudy, *, is_up: bool = True, enrolled: tuple[str, ...] = SITES) -> StudyReport:
    study = world.store.find(study.record.plan_sha256)
    if not is_up:
        return report(study, Surroundings(world.clock(), enrolled))
    return report(study, Surroundings(world.clock(), enrolled, world.link.runs(), {"a", "b"}))


def keep(study: StoredStudy, number: int, facts: StudyFacts) -> None:
    arrays = {"a": np.zeros(2, np.float32)}
    kept = Checkpoint(number, ServerState(arrays, OptimizerState(0, {})), {}, facts.to_dict())
    save_checkpoint(study.path / "checkpoints", study.record.plan_sha256, kept)


def test_a_study_nobody_works_on_is_queued_with_what_it_has_reached(world: World) -> None:
    study = world.submit()
    keep(study, 4, StudyFacts())
    found = seen(world, study, is_up=False)
    assert (found.state, found.round, found.rounds) == ("queued", 4, 20)
    assert found.sites[0].online is None
    assert found.epsilon_planned == 3.0


def test_the_round_in_flight_names_every_site_with_what_it_does(world: World) -> None:
    study = world.submit()
    world.begun()
    keep(
        study,
        1,
        StudyFacts(
            {
                "c": SiteFacts(
                    "c", 10, "", failures={"message.not-finite": 1}, quarantine="message.not-finite", quarantines=1
                ),
                "d": SiteFacts("d", 10, "", rounds=1, failures={"federation.deadline": 2}, rests_until=3),
            },
            refused={"e": "witness.rolled-back"},
        ),
    )
    progress = FileProgress(study.path)
    progress.study_started(study_info(study.plan, study.path))
    progress.round_done(RoundInfo(1, 6, 4, {}, 0.2, 0.81, 12.0))
    progress.round_started(2, 3)
    progress.site_done("a")
    progress.site_failed("b", "federation.deadline")
    progress._write_late()
    found = seen(world, study, enrolled=SITES[:5])
    assert (found.state, found.in_round, found.metric, found.epsilon) == ("running", 2, 0.81, 0.2)
    assert found.seconds_left == 12.0 * 19
    states = {site.name: (site.state, site.code) for site in found.sites}
    assert states == {
        "a": ("answered", ""),
        "b": ("failed", "federation.deadline"),
        "c": ("quarantined", "message.not-finite"),
        "d": ("resting", ""),
        "e": ("refused", "witness.rolled-back"),
        "f": ("not enrolled", ""),
    }
    by_name = {site.name: site for site in found.sites}
    assert by_name["b"].failures == {"federation.deadline": 1}
    assert by_name["d"].failures == {"federation.deadline": 2}
    assert by_name["c"].quarantine == "message.not-finite"
    assert (by_name["a"].online, by_name["c"].online) == (True, False)
    progress.study_done()


def test_a_waiting_study_says_why_and_until_when_and_a_failed_one_that_nobody_tries(world: World) -> None:
    study = world.submit()
    world.link.end(world.begun(), "federation.no-quorum")
    world.tick(2)
    found = seen(world, study)
    assert found.state == "waiting"
    assert found.failure is not None
    assert (found.failure.code, found.failure.failures) == ("federation.no-quorum", 1)
    assert found.failure.again is not None
    keep(study, 1, StudyFacts())
    assert seen(world, study).failure is None, "a round was kept since"
    assert seen(world, study, is_up=False).state == "queued"
    world.store.resume(study)
    world.tick(1)
    world.link.end(world.begun(), "model.other-base")
    world.tick(2)
    found = seen(world, study)
    assert found.state == "failed"
    assert found.failure is not None
    assert found.failure.again is None
    assert seen(world, study, is_up=False).state == "failed"


def test_progress_of_an_attempt_that_was_killed_is_no_round_in_flight(world: World) -> None:
    study = world.submit()
    progress = FileProgress(study.path)
    progress.study_started(study_info(study.plan, study.path))
    progress.round_started(1, 6)
    progress._write_late()
    found = seen(world, study)
    assert (found.state, found.in_round) == ("queued", None)
    assert {site.state for site in found.sites} == {"-"}
