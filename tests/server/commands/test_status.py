"""What stands on disk is shown without a coordinator, and with one what its processes say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedtune.journal.chain import moment
from fedtune.processes import health
from fedtune.processes.health import Readiness
from fedtune.processes.log_lines import to_json
from fedtune_server.studies.record import Attempts, write_attempts
from fedtune_server.studies.store import StoredStudy, StudyStore
from fedtune_server.supervision import told
from tests.server.commands.conftest import Office
from tests.server.studies.conftest import SITES, START, machine_of, plan_of


@pytest.fixture
def study(office: Office) -> StoredStudy:
    plan = plan_of("triage")
    return StudyStore(office.place).submit(plan, SITES, machine_of(office.place.study(plan)))


def fail(study: StoredStudy, code: str) -> None:
    write_attempts(
        study.path,
        Attempts(run=1, failures=1, at=moment(START), code=code, message="what was found", hint="what to do"),
    )


def test_a_coordinator_that_is_down_shows_what_it_would_go_on_with(office: Office, study: StoredStudy) -> None:
    found = office.json("status")
    assert found["server"] == {"up": False, "ready": False, "processes": [], "problem": ""}
    (shown,) = found["studies"]
    assert (shown["name"], shown["state"], shown["round"], shown["rounds"]) == ("triage", "queued", 0, 20)
    text = office.done("status").out
    assert "the coordinator is down; start it: fedtune server up" in text
    assert study.record.plan_sha256[:12] in text


def test_a_failed_study_says_why_and_what_a_person_can_do(office: Office, study: StoredStudy) -> None:
    fail(study, "model.other-base")
    text = office.done("status").out
    assert "what was found [model.other-base]" in text
    assert "hint: what to do" in text
    assert f"to go on: fedtune server resume {study.record.plan_sha256[:12]}" in text


def test_one_study_shows_each_of_its_sites(office: Office, study: StoredStudy) -> None:
    found = office.json("status", study.record.plan_sha256[:8])
    assert [site["name"] for site in found["studies"][0]["sites"]] == list(SITES)
    assert {site["state"] for site in found["studies"][0]["sites"]} == {"not enrolled"}
    assert "not enrolled" in office.done("status", "triage").out
    assert "error[study.unknown]" in office.refused("status", "another")


def test_a_damaged_study_is_named_beside_the_others(office: Office, study: StoredStudy) -> None:
    plan = plan_of("broken")
    place = StudyStore(office.place).submit(plan, SITES, machine_of(office.place.study(plan))).path
    (place / "study.json").write_text("{")
    found = office.json("status")
    assert [shown["name"] for shown in found["studies"]] == ["triage"]
    assert [(damage["folder"], damage["code"]) for damage in found["damaged"]] == [(place.name, "study.damaged")]
    assert "is damaged and left out" in office.done("status").out


def test_the_processes_of_a_coordinator_that_is_up_are_shown(office: Office, study: StoredStudy) -> None:
    processes = [
        {"name": "link", "status": "waiting", "restarts": 3},
        {"name": "executor", "status": "starting", "restarts": 0},
    ]
    report = Readiness(False, {"link": "waiting", "executor": "starting"}, {"processes": processes})
    with health.serve(0, lambda: report) as port, told(office.place, port):
        found = office.json("status")
        text = office.done("status").out
    assert found["server"]["up"] is True
    assert "not ready: link waiting, restarted 3 times, executor starting" in text
    assert office.json("status")["server"]["up"] is False


def test_a_supervisor_that_was_killed_is_not_taken_for_one_that_is_up(office: Office) -> None:
    (office.place.run / "supervisor.json").write_text(json.dumps({"pid": os.getpid(), "health": 9}))
    assert office.json("status")["server"]["up"] is False


def test_watching_ends_when_nothing_is_left_to_do(office: Office, study: StoredStudy) -> None:
    (study.path / "summary.json").write_text("{}")
    done = office.done("status", "--watch", "--format", "json")
    assert done.json["studies"][0]["state"] == "done"


def test_the_logs_of_all_processes_are_one_log_in_the_order_of_time(office: Office) -> None:
    def line(second: int, process: str) -> str:
        at = f"2026-11-22T12:00:{second:02d}.000Z"
        return to_json({"time": at, "level": "INFO", "logger": "x", "process": process, "message": f"said {second}"})

    _write(office.place.logs / "link.jsonl", line(1, "link"), line(3, "link"))
    _write(office.place.logs / "executor.jsonl", line(2, "executor"))
    text = office.done("logs").out
    assert [text.index(f"said {number}") for number in (1, 2, 3)] == sorted(
        text.index(f"said {number}") for number in (1, 2, 3)
    )
    only = office.done("logs", "--role", "executor", "--format", "json")
    assert json.loads(only.out)["message"] == "said 2"
    assert "error[process.unknown-role]" in office.refused("logs", "--role", "cook")
    assert "error[config.bad-value]" in office.refused("logs", "--since", "yesterday")


def _write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))
