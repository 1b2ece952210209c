"""A study is handed over: the plan of a simulation unchanged, or one that is made apart from the records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from fedtune.config.compose import compose
from fedtune.config.plan import StudyPlan
from fedtune.run.folder import RunFolder
from fedtune.simulation.resolve import resolve
from fedtune_server.studies.record import read_record
from tests.server.commands.conftest import Office, key_file
from tests.support.runs import Study, make_study
from tests.support.tiny import bank_csv, tiny_base

TOLD = ("data.name=claims", "data.labels=[card,cash]", "privacy.delta=1e-3")
SITES = ("east", "north", "south")


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, StudyPlan]:
    """A small study on a file, and the plan that a simulation of it runs."""
    study = make_study(tmp_path_factory.mktemp("submitted"))
    return study, resolve(compose(study.words(*TOLD))).plan


@pytest.fixture
def study(simulated: tuple[Study, StudyPlan]) -> Study:
    return simulated[0]


@pytest.fixture
def plan(simulated: tuple[Study, StudyPlan], tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(simulated[1].json_text)
    return path


def say(office: Office, **changes: object) -> None:
    """Change keys of coordinator.yaml."""
    found = yaml.safe_load(office.place.facts_file.read_text())
    office.place.facts_file.write_text(yaml.safe_dump({**found, "models": {}, "tests": {}, "device": "cpu", **changes}))


@pytest.fixture(scope="session")
def enrolled(tmp_path_factory: pytest.TempPathFactory, made: Path) -> Path:
    """A coordinator's folder with three sites, that is copied and never changed."""
    folder = tmp_path_factory.mktemp("enrolled")
    office = Office(folder)
    shutil.copytree(made, office.place.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FEDTUNE_AUTHORITY_KEY_FILE", str(key_file(folder / "authority.key", 7)))
        for name in SITES:
            office.enrol(office.site(name))
    return office.place.path


@pytest.fixture
def ready(empty: Office, enrolled: Path, study: Study) -> Office:
    """A coordinator with three sites that knows the study's base model."""
    shutil.copytree(enrolled, empty.place.path)
    say(empty, models={"tiny": str(study.base)})
    return empty


def test_the_plan_of_a_simulation_is_kept_unchanged_with_what_it_needs_here(
    ready: Office, plan: Path, simulated: tuple[Study, StudyPlan]
) -> None:
    found = ready.json("submit", str(plan), "--yes")
    assert found["plan_sha256"] == simulated[1].sha256
    assert Path(found["plan_file"]).read_bytes() == plan.read_bytes()
    place = Path(found["plan_file"]).parent
    machine = RunFolder(place).machine()
    assert (machine.run_dir, machine.model_folder, machine.device) == (str(place), str(simulated[0].base), "cpu")
    assert (machine.data_path, machine.test_path) == (None, None)
    assert read_record(place).sites == SITES
    assert found["privacy"]["statement"] == simulated[1].promise.statement


def test_a_study_made_of_settings_is_the_simulations_to_the_hash(
    ready: Office, study: Study, simulated: tuple[Study, StudyPlan]
) -> None:
    words = [word for word in study.words(*TOLD) if not word.startswith(("data.path", "model.base"))]
    found = ready.json("submit", *words, "data.source=file", "model.base=tiny", "--yes")
    assert found["plan_sha256"] == simulated[1].sha256


def test_a_run_folder_and_the_output_of_fedtune_plan_name_a_plan_too(
    ready: Office, simulated: tuple[Study, StudyPlan], tmp_path: Path
) -> None:
    run, plan = tmp_path / "run", simulated[1]
    run.mkdir()
    (run / "plan.json").write_text(plan.json_text)
    assert ready.json("submit", str(run), "--yes")["plan_sha256"] == plan.sha256
    shown = tmp_path / "shown.json"
    shown.write_text(json.dumps({"plan": plan.model_dump(mode="json"), "plan_sha256": plan.sha256}, indent=1))
    assert "[study.exists]" in ready.refused("submit", str(shown), "--yes")


def test_what_a_person_reads_names_the_promise_the_plan_file_and_the_next_command(ready: Office, plan: Path) -> None:
    text = ready.done("submit", str(plan), "--yes").out
    for words in (
        "differential privacy",
        "plan.json",
        "fedtune client approve plan.json",
        "fedtune server up",
        "seeded",
    ):
        assert words in text


def test_without_a_yes_nobody_has_agreed_and_nothing_is_kept(ready: Office, plan: Path) -> None:
    done = ready.run("submit", str(plan))
    assert done.code == 2
    assert "error[config.not-confirmed]" in done.err
    assert not list(ready.place.studies.glob("*/study.json"))


def test_the_same_plan_is_refused_the_second_time_and_says_what_to_do(ready: Office, plan: Path) -> None:
    ready.done("submit", str(plan), "--yes")
    error = ready.refused("submit", str(plan), "--yes")
    assert "error[study.exists]" in error
    assert "fedtune server status" in error


def test_sites_must_be_enrolled_and_as_many_as_the_plan_says(ready: Office, plan: Path) -> None:
    error = ready.refused("submit", str(plan), "--yes", "--sites", "north,south")
    assert "error[study.site-count]: the plan is for 3 sites, and 2 are named (north, south)" in error
    assert "--sites east,north,south" in error
    assert "error[enrolment.not-enrolled]" in ready.refused("submit", str(plan), "--yes", "--sites", "north,south,west")
    ready.enrol(ready.site("west"))
    error = ready.refused("submit", str(plan), "--yes")
    assert "4 are enrolled (east, north, south, west)" in error
    assert ready.json("submit", str(plan), "--yes", "--sites", "west, north,east")["sites"] == ["east", "north", "west"]


def test_a_revoked_site_is_not_asked(ready: Office, plan: Path) -> None:
    ready.done("enrol", "revoke", "south", "--reason", "left")
    error = ready.refused("submit", str(plan), "--yes")
    assert "2 are enrolled (east, north)" in error
    assert "enrol 1 more" in error


def test_a_base_model_is_found_by_its_content_and_its_absence_names_what_was_looked_through(
    ready: Office, plan: Path, study: Study, tmp_path: Path
) -> None:
    other = tiny_base(tmp_path / "other", seed=1)
    say(ready, models={"other": str(other), "gone": str(tmp_path / "gone")})
    error = ready.refused("submit", str(plan), "--yes")
    assert "error[model.unknown-base]" in error
    assert str(other) in error
    assert str(tmp_path / "gone") in error
    say(ready, models={"other": str(other), "renamed": str(study.base)})
    assert ready.json("submit", str(plan), "--yes")["base_model"]["folder"] == str(study.base)


def test_the_coordinators_own_test_file_is_found_by_the_data_sets_name_and_must_fit(
    ready: Office, plan: Path, study: Study, tmp_path: Path
) -> None:
    test, unfit = bank_csv(tmp_path / "test.csv", rows=8, seed=3), tmp_path / "unfit.csv"
    unfit.write_text("a,b\n1,2\n")
    models = {"tiny": str(study.base)}
    say(ready, models=models, tests={"claims": str(unfit)})
    assert "error[data.missing-column]" in ready.refused("submit", str(plan), "--yes")
    say(ready, models=models, tests={"claims": str(test), "other": str(unfit)})
    assert ready.json("submit", str(plan), "--yes")["test_file"] == str(test)


def test_a_plan_is_not_changed_on_the_way(ready: Office, plan: Path) -> None:
    assert "error[config.conflict]" in ready.refused("submit", str(plan), "federation.rounds=9", "--yes")


@pytest.mark.parametrize(
    ("content", "code"), [(None, "config.no-plan"), ("{", "config.bad-plan"), ('{"plan": 1}', "config.bad-plan")]
)
def test_what_is_no_plan_is_refused(ready: Office, content: str | None, code: str) -> None:
    path = ready.folder / "strange.json"
    if content is not None:
        path.write_text(content)
    assert f"error[{code}]" in ready.refused("submit", str(path), "--yes")


def test_settings_that_leave_to_the_records_what_nobody_sees_here_are_refused_by_name(ready: Office) -> None:
    error = ready.refused("submit", "data.source=file", "data.text=text", "data.label=category", "--yes")
    assert "privacy.delta" in error
    assert "data.name" in error
