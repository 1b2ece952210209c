from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.processes import lifeline
from tests.support.children import ROOT, Place, lives, wait_for

# A supervisor of one child, to be killed.
_SUPERVISOR = """
import sys
from pathlib import Path
from fedtune.processes.supervisor import Supervisor
from tests.support.children import Place
place = Place(Path(sys.argv[1]))
Supervisor([place.spec("child", *sys.argv[2:])]).run()
"""


def supervisor(place: Place, *words: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", _SUPERVISOR, str(place.folder), *words], env=environment)


def killed(place: Place, *words: str) -> int:
    """Start a supervisor, kill it when its child works, and return the child."""
    process = supervisor(place, *words)
    try:
        wait_for(lambda: "child works" in place.story)
    finally:
        process.kill()
        process.wait()
    return place.pid("child")


def test_a_child_ends_in_order_when_its_supervisor_is_killed(place: Place) -> None:
    child = killed(place, "watch", "ready")
    wait_for(lambda: not lives(child))
    assert place.story[-1] == "child ends"


def test_a_child_that_does_not_watch_outlives_its_supervisor(place: Place) -> None:
    child = killed(place, "ready")
    try:
        with pytest.raises(AssertionError, match="in time"):
            wait_for(lambda: not lives(child), 0.6)
    finally:
        os.killpg(child, signal.SIGKILL)


def test_a_child_that_does_not_hear_sigterm_ends_all_the_same(place: Place) -> None:
    child = killed(place, "watch", "deaf", "ready")
    wait_for(lambda: not lives(child))
    assert "child ends" not in place.story


@pytest.mark.parametrize("kind", ["tidy", "untidy"])
def test_what_a_child_has_started_does_not_keep_the_line_open(place: Place, kind: str) -> None:
    child = killed(place, "watch", f"start={kind}", "ready")
    grandchild = place.grandchild("child")
    try:
        wait_for(lambda: not lives(child))
        assert lives(grandchild)
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_child_of_a_supervisor_that_lives_goes_on(place: Place) -> None:
    process = supervisor(place, "watch", "ready")
    try:
        wait_for(lambda: "child works" in place.story)
        with pytest.raises(AssertionError, match="in time"):
            wait_for(lambda: not lives(place.pid("child")), 0.6)
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not lives(place.pid("child"))


@pytest.mark.parametrize("value", ["", "x", "-1", "99999", "99999999999999999999", "0"])
def test_a_variable_without_a_pipe_is_no_lifeline(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(lifeline.VARIABLE, value)
    if value == "0":
        file = (tmp_path / "file").open("w")
        monkeypatch.setenv(lifeline.VARIABLE, str(file.fileno()))
    assert not lifeline.watch()
    assert lifeline.VARIABLE not in os.environ


def test_a_grandchild_gets_neither_the_variable_nor_the_pipe() -> None:
    program = (
        "import os, subprocess, sys\nfrom fedtune.processes import lifeline\nnumber = os.environ[lifeline.VARIABLE]\n"
        "assert lifeline.watch()\n"
        'look = f\'import os; print(os.environ.get("{lifeline.VARIABLE}"), os.path.exists("/dev/fd/{number}"))\'\n'
        "subprocess.run([sys.executable, '-c', look], close_fds=False)\n"
    )
    with lifeline.Lifeline() as line:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(ROOT), **line.variables},
            pass_fds=line.pass_fds,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == "None False\n"
