"""What a person wants of a study is written down, and holds whether a coordinator runs or not."""

from __future__ import annotations

import pytest

from fedtune_server.studies.record import read_record
from fedtune_server.studies.store import StoredStudy, StudyStore
from tests.server.commands.conftest import Office
from tests.server.studies.conftest import SITES, machine_of, plan_of


@pytest.fixture
def study(office: Office) -> StoredStudy:
    plan = plan_of("triage")
    return StudyStore(office.place).submit(plan, SITES, machine_of(office.place.study(plan)))


def test_a_study_is_stopped_by_its_name_and_resumed_by_its_hash(office: Office, study: StoredStudy) -> None:
    found = office.json("stop", "triage")
    assert (found["wish"], read_record(study.path).wish) == ("stop", "stop")
    assert "was to stop before" in office.done("stop", "triage").out
    found = office.json("resume", study.record.plan_sha256[:6])
    assert (found["wish"], read_record(study.path).wish) == ("run", "run")


def test_a_site_is_let_out_of_quarantine_by_name(office: Office, study: StoredStudy) -> None:
    assert office.json("resume", "triage", "--release", "b", "--release", "c")["released"] == ["b", "c"]
    assert read_record(study.path).released == ("b", "c")
    error = office.refused("resume", "triage", "--release", "stranger")
    assert "error[study.other-site]" in error


@pytest.mark.parametrize("word", ["stop", "resume"])
def test_studies_that_are_not_there_or_have_ended_are_refused(office: Office, study: StoredStudy, word: str) -> None:
    assert "error[study.unknown]" in office.refused(word, "another")
    (study.path / "summary.json").write_text("{}")
    error = office.refused(word, "triage")
    assert "error[study.finished]" in error
    assert study.path.name in error


@pytest.mark.parametrize("words", [("stop", "x"), ("resume", "x"), ("status",), ("logs",), ("up",), ("submit", "x")])
def test_a_folder_that_is_no_coordinators_is_said_to_be_none(empty: Office, words: tuple[str, ...]) -> None:
    assert "error[config.file-missing]" in empty.refused(*words)
