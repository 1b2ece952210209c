"""What was submitted: kept whole or not at all, found by name or hash, changed by one process at a time."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from fedtune.config.plan import StudyPlan
from fedtune.errors import StudyError
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.studies.record import RECORD_FILE, read_record
from fedtune_server.studies.store import StudyStore
from tests.client.policy.conftest import plan_text
from tests.server.studies.conftest import SITES, World, machine_of, plan_of


def refusal(act: object, *given: object) -> StudyError:
    assert callable(act)
    with pytest.raises(StudyError) as refused:
        act(*given)
    assert refused.value.hint
    return refused.value


def test_a_study_is_a_run_folder_whose_plan_has_the_hash_that_the_sites_approve(world: World) -> None:
    study = world.submit()
    assert (study.path / "plan.json").read_text() == plan_of().json_text
    assert study.path.name == f"study-{plan_of().sha256[:12]}"
    assert study.record.sites == SITES
    assert (study.path / "checkpoints").is_dir()
    assert StudyStore(world.folder).read().studies == (study,)


def test_the_same_plan_is_one_study(world: World) -> None:
    world.submit()
    error = refusal(world.store.submit, plan_of(), SITES, machine_of(world.folder.path))
    assert error.code == "study.exists"


@pytest.mark.parametrize("left", ["nothing", "machine.json", "plan.json"])
def test_a_submission_that_was_killed_counts_for_nothing_and_can_be_made_again(world: World, left: str) -> None:
    place = world.folder.study(plan_of())
    world.submit("another")
    place.mkdir()
    (place / "checkpoints").mkdir()
    if left != "nothing":
        (place / left).write_text("{")
    (place / f".{RECORD_FILE}.partial").write_text("{")
    assert [study.record.name for study in world.store.read().studies] == ["another"]
    assert world.submit().plan == plan_of()


def test_studies_are_found_by_name_hash_and_folder(world: World) -> None:
    one, two = world.submit("one"), world.submit("two")
    for words in ("one", one.path.name, one.record.plan_sha256, one.record.plan_sha256[:4]):
        assert world.store.find(words) == one
    assert refusal(world.store.find, "three").code == "study.unknown"
    assert refusal(world.store.find, two.record.plan_sha256[:3]).code == "study.unknown"


def test_a_name_that_several_studies_have_needs_a_hash(world: World) -> None:
    first = world.submit("one")
    other = StudyPlan.from_json(plan_text(name="one", seed=8))
    world.store.submit(other, SITES, machine_of(world.folder.study(other)))
    error = refusal(world.store.find, "one")
    assert error.code == "study.ambiguous"
    assert first.record.plan_sha256[:12] in error.hint


def test_a_damaged_study_is_said_to_be_when_it_is_meant(world: World) -> None:
    study = world.submit()
    (study.path / RECORD_FILE).write_text("not json")
    assert refusal(world.store.find, study.path.name).code == "study.damaged"
    assert [found.path for found in world.store.read().damaged] == [study.path]


def test_a_plan_that_was_changed_afterwards_is_not_run(world: World) -> None:
    study = world.submit()
    other = plan_of("other").json_text
    (study.path / "plan.json").write_text(other)
    assert [found.error.code for found in world.store.read().damaged] == ["study.damaged"]


def test_a_study_that_has_ended_is_neither_stopped_nor_resumed(world: World) -> None:
    study = world.submit()
    (study.path / "summary.json").write_text("{}")
    assert refusal(world.store.stop, study).code == "study.finished"
    assert refusal(world.store.resume, study).code == "study.finished"


def test_only_a_site_of_the_study_is_released_and_each_time_is_kept(world: World) -> None:
    study = world.submit()
    assert refusal(world.store.resume, study, ["stranger"]).code == "study.other-site"
    world.store.resume(study, ["b"])
    record = world.store.resume(study, ["b", "c"])
    assert (record.released, record.resumed, record.wish) == (("b", "b", "c"), 2, "run")


def _resume(path: Path, times: int) -> None:
    store = StudyStore(CoordinatorFolder(path))
    for _ in range(times):
        store.resume(store.find("study"))


def test_wishes_of_several_processes_are_all_kept(world: World) -> None:
    study = world.submit()
    context = multiprocessing.get_context("fork")
    people = [context.Process(target=_resume, args=(world.folder.path, 20)) for _ in range(3)]
    for person in people:
        person.start()
    for person in people:
        person.join(60)
    assert read_record(study.path).resumed == 60


def test_a_folder_that_takes_no_study_says_so(tmp_path: Path) -> None:
    folder = CoordinatorFolder(tmp_path / "coordinator")
    folder.path.mkdir()
    folder.studies.write_text("a file")
    store = StudyStore(folder)
    assert refusal(store.read).code == "study.unreadable"
    assert refusal(store.submit, plan_of(), SITES, machine_of(tmp_path)).code == "study.unwritable"
