"""`fedtune server up` as a process, with its children as processes of their own, which are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.config.compose import compose
from fedtune.simulation.resolve import resolve
from fedtune_server.studies.record import read_attempts
from tests.server.commands.conftest import Office
from tests.support.federation import wait_for
from tests.support.runs import make_study, process

pytestmark = pytest.mark.slow
LONG = 90.0  # seconds for a process to come up on a busy machine


@pytest.fixture
def ready(office: Office) -> Office:
    """A coordinator with a site that never connects, and a study that waits for it for two seconds."""
    study = make_study(office.folder / "study")
    office.enrol(office.site("north"))
    facts = yaml.safe_load(office.place.facts_file.read_text())
    changes = {"listen": {"host": "127.0.0.1", "port": _port()}, "private_port": 0, "health_port": 0, "device": "cpu"}
    office.place.facts_file.write_text(
        yaml.safe_dump(facts | changes | {"models": {"tiny": str(study.base)}, "tests": {}})
    )
    words = study.words("data.name=claims", "privacy.delta=1e-3", "federation.sites=1", "federation.deadline=2")
    plan = resolve(compose(words)).plan
    (office.folder / "plan.json").write_text(plan.json_text)
    return office


@pytest.fixture
def started(ready: Office) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Return what starts a coordinator and waits until its processes work; each is ended with the test."""
    running: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "fedtune.cli", "server", "up"]
        with (ready.folder / "up.log").open("ab") as log:
            running.append(subprocess.Popen(words, cwd=ready.folder, stdout=log, stderr=log, text=True))
        wait_for(lambda: status(ready)["server"]["ready"], LONG)
        return running[-1]

    yield start
    for one in running:
        one.kill()
        one.wait(30)


def status(office: Office) -> Any:
    return office.json("status")


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _pids(office: Office) -> dict[str, int]:
    return {found["name"]: found["pid"] for found in status(office)["server"]["processes"]}


def _study(office: Office) -> Any:
    return status(office)["studies"][0]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]


def test_a_study_goes_on_by_itself_after_every_death(
    ready: Office, started: Callable[[], subprocess.Popen[str]]
) -> None:
    coordinator = started()
    plan = str(ready.folder / "plan.json")
    place = Path(ready.json("submit", plan, "--yes")["plan_file"]).parent
    found = wait_for(lambda: _study(ready)["failure"], LONG)
    assert found["code"] == "federation.no-quorum", "nobody is there, and it is said so"
    assert _study(ready)["state"] in {"waiting", "starting", "running", "queued"}

    first = _pids(ready)
    os.kill(first["executor"], signal.SIGKILL)
    os.kill(first["link"], signal.SIGKILL)
    wait_for(lambda: status(ready)["server"]["ready"] and _pids(ready).keys() == first.keys(), LONG)
    assert not set(_pids(ready).values()) & set(first.values())
    before = read_attempts(place).run
    wait_for(lambda: read_attempts(place).run != before, LONG)

    children = _pids(ready)
    coordinator.kill()
    coordinator.wait(30)
    wait_for(lambda: not any(map(_lives, children.values())), 30)
    assert status(ready)["server"]["up"] is False
    before = read_attempts(place).run
    coordinator = started()
    wait_for(lambda: read_attempts(place).run != before, LONG)

    ready.done("stop", "study")
    wait_for(lambda: _study(ready)["state"] == "stopped", LONG)
    ready.done("resume", "study")
    wait_for(lambda: _study(ready)["state"] in {"starting", "running", "waiting"}, LONG)

    children = _pids(ready)
    coordinator.send_signal(signal.SIGTERM)
    assert coordinator.wait(60) == 0
    assert not any(map(_lives, children.values()))
    assert status(ready)["server"]["up"] is False


def test_one_coordinator_runs_in_a_folder_and_says_where_it_listens(
    ready: Office, started: Callable[[], subprocess.Popen[str]]
) -> None:
    started()
    text = (ready.folder / "up.log").read_text()
    for words in ("sites reach it at fl.example.org:8443", "port", "/ready", "logs"):
        assert words in text
    assert "error[process.in-use]" in ready.refused("up")
    assert "running already" in ready.run("up").err
    lines = [json.loads(line) for line in ready.done("logs", "--format", "json").out.splitlines()]
    assert {line["process"] for line in lines} == {"link", "executor", "supervisor"}


def test_no_secret_of_the_authoritys_reaches_a_child(
    ready: Office, started: Callable[[], subprocess.Popen[str]]
) -> None:
    assert os.environ["FEDTUNE_AUTHORITY_KEY_FILE"]
    started()
    for pid in _pids(ready).values():
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"FEDTUNE_COORDINATOR=" in environment
        assert b"FEDTUNE_AUTHORITY" not in environment


def test_a_port_that_is_taken_ends_it_with_the_reason(ready: Office) -> None:
    facts = yaml.safe_load(ready.place.facts_file.read_text())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        facts["listen"]["port"] = taken.getsockname()[1]
        ready.place.facts_file.write_text(yaml.safe_dump(facts))
        running = process("server", "up", cwd=ready.folder)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "error[process.not-started]" in err
    assert "transport.port-in-use" in err
