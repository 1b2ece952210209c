from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ProcessError, StudyError
from fedtune.processes import logs
from fedtune.processes.backoff import Backoff
from fedtune.processes.child import ChildSpec
from fedtune.processes.supervisor import Supervisor
from tests.processes.conftest import Supervise
from tests.support.children import ROOT, Place, lives, wait_for

QUICK = Backoff(first=0.05, longest=0.1)
pytestmark = pytest.mark.usefixtures("_plain_logging")


def failure(supervisor: Supervisor) -> ProcessError:
    with pytest.raises(ProcessError) as caught:
        supervisor.run()
    assert caught.value.code == "process.not-started"
    return caught.value


# Order


def test_children_start_each_after_the_one_before_is_ready_and_end_the_other_way_round(
    place: Place, supervise: Supervise
) -> None:
    specs = [place.spec("a", "after=0.4", "ready"), place.spec("b", "after=0.2", "ready"), place.spec("c", "ready")]
    running = supervise(Supervisor(specs))
    assert running.state("b").status == "waiting"
    running.until("c", "ready")
    wait_for(lambda: "c works" in place.story)
    running.end()
    assert place.story == [
        *("a starts", "a works", "b starts", "b works", "c starts", "c works"),
        *("c ends", "b ends", "a ends"),
    ]
    assert {(state.status, state.last_exit, state.pid) for state in running.supervisor.states} == {("stopped", 0, None)}


def test_a_child_without_a_ready_file_is_ready_at_once(place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", ready=None), place.spec("b", "ready")]))
    running.until("b", "ready")
    assert running.state("a").status == "ready"


def test_a_ready_file_of_another_process_is_not_the_childs(place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", "other"), place.spec("b", "ready")]))
    wait_for(lambda: "a works" in place.story)
    with pytest.raises(AssertionError, match="in time"):
        running.until("a", "ready", 0.5)
    assert "b starts" not in place.story


def test_a_ready_file_from_before_is_removed_when_the_child_starts(place: Place, supervise: Supervise) -> None:
    (place.folder / "a.ready").write_text("no JSON")
    running = supervise(Supervisor([place.spec("a")]))
    wait_for(lambda: "a works" in place.story)
    assert not (place.folder / "a.ready").exists()
    assert running.state("a").status == "starting"


def test_the_child_of_a_killed_supervisor_may_end_first(place: Place, supervise: Supervise) -> None:
    """Its port and its folder are still in use: starting at once would fail."""
    before = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (place.folder / "a.ready").write_text(f'{{"pid": {before.pid}}}')
    running = supervise(Supervisor([place.spec("a", "ready")]))
    try:
        with pytest.raises(AssertionError, match="in time"):
            wait_for(lambda: place.story, 0.5)
        assert (place.folder / "a.ready").exists()
    finally:
        before.kill()
        before.wait()
    running.until("a", "ready")


# Restarts


def test_a_killed_child_starts_again_and_the_others_stay(place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", "ready"), place.spec("b", "ready")], QUICK))
    other = running.until("b", "ready").pid
    for restarts in (1, 2):
        os.kill(running.until("a", "ready").pid, signal.SIGKILL)
        wait_for(lambda restarts=restarts: running.state("a").restarts == restarts)
    found = running.until("a", "ready")
    assert (found.last_exit, found.restarts) == (-signal.SIGKILL, 2)
    assert running.state("b").pid == other


def test_a_child_that_keeps_failing_is_tried_after_longer_and_longer_pauses(place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", "exit=1")], Backoff(first=0.2, longest=30)))
    pauses = []
    for restarts in range(3):
        state = wait_for(lambda count=restarts: (s := running.state("a")).restarts == count and s.next_start and s)
        pauses.append(state.next_start - state.since)
    assert [round(pause, 1) for pause in pauses] == [0.2, 0.4, 0.8]
    assert running.error is None


def test_a_child_that_ends_well_is_started_again_too(place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", "ready", "exit=0")], QUICK))
    wait_for(lambda: place.story.count("a starts") >= 2)
    assert running.state("a").last_exit == 0


def test_a_child_that_does_not_become_ready_is_killed_and_started_again(place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", "once=hang", "ready", starting=0.5)], QUICK))
    found = running.until("a", "ready")
    assert (found.restarts, found.last_exit) == (1, -signal.SIGKILL)


def test_what_a_child_has_started_is_killed_with_it(place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", "start=tidy", "ready")], QUICK))
    grandchild = place.grandchild("a")
    os.kill(running.until("a", "ready").pid, signal.SIGKILL)
    wait_for(lambda: not lives(grandchild))


def test_a_stopped_child_is_killed_and_started_again_when_its_probe_fails_for_long(
    place: Place, supervise: Supervise
) -> None:
    def awake() -> bool:
        stat = Path(f"/proc/{place.pid('a')}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[0] != "T"

    if not Path("/proc/self/stat").exists():
        pytest.skip("processes' states are not in /proc here")
    running = supervise(Supervisor([place.spec("a", "ready", probe=awake, probe_every=0.05, silence=0.5)], QUICK))
    first = running.until("a", "ready").pid
    with pytest.raises(AssertionError, match="in time"):
        wait_for(lambda: running.state("a").restarts, 1.0)
    os.kill(first, signal.SIGSTOP)
    wait_for(lambda: running.state("a").restarts == 1)
    assert running.until("a", "ready").last_exit == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["hangs", "raises", "says no"])
def test_any_probe_without_an_answer_counts(kind: str, place: Place, supervise: Supervise) -> None:
    over = threading.Event()

    def probe() -> bool:
        if kind == "hangs":
            over.wait(20)
        if kind == "raises":
            raise OSError
        return False

    running = supervise(Supervisor([place.spec("a", "ready", probe=probe, probe_every=0.05, silence=0.3)], QUICK))
    wait_for(lambda: running.state("a").restarts >= 1)
    over.set()


# First starts that cannot succeed


def test_settings_that_cannot_be_used_end_it_all_with_what_the_child_said(place: Place) -> None:
    specs = [place.spec("a", "ready"), place.spec("b", "log=port 8443 is in use", "say=later", "exit=2")]
    error = failure(Supervisor(specs))
    assert error.message == "b ended with exit code 2: port 8443 is in use [test.wrong]"
    assert error.hint == "mend it"
    assert place.story[-1] == "a ends"
    assert not lives(place.pid("a"))


def test_what_a_child_printed_is_told_when_it_logged_nothing(place: Place) -> None:
    error = failure(Supervisor([place.spec("a", "say=usage: token=abc", "exit=2", ready=None)]))
    assert error.message == "a ended with exit code 2: usage: token=[hidden]"


def test_a_program_that_is_not_there_is_said(place: Place) -> None:
    error = failure(Supervisor([ChildSpec("a", ("/none/such",), {})]))
    assert error.message == "a cannot be started: No such file or directory"


@pytest.mark.parametrize("words", [("exit=1",), ("once=1", "exit=2"), ("ready", "after=0.4", "exit=2")])
def test_any_other_end_is_no_reason_to_give_up(words: tuple[str, ...], place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", *words)], QUICK))
    wait_for(lambda: running.state("a").restarts >= 2)
    assert running.error is None


# The supervisor itself


def test_no_error_of_a_tick_ends_it_and_the_same_error_is_said_once(
    place: Place, supervise: Supervise, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) < 5:
            raise StudyError("unknown", "no such study", hint="fedtune server status")
        if len(ticks) < 8:
            raise ValueError("patient 4711")

    running = supervise(Supervisor([place.spec("a", "ready")]), tick, every=0.0)
    wait_for(lambda: len(ticks) > 10)
    assert running.state("a").status in {"starting", "ready"}
    errors = [(record.message, getattr(record, "code", "")) for record in caplog.records if record.levelno >= 40]
    assert errors == [("no such study", "study.unknown"), ("the supervisor's own work failed", "")]


def test_a_tick_can_end_it(place: Place) -> None:
    supervisor = Supervisor([place.spec("a", "ready")])

    def tick() -> None:
        if supervisor.states[0].status == "ready":
            supervisor.stop()

    supervisor.run(tick, every=0.0)
    assert place.story[-1] == "a ends"


def test_its_own_signal_handlers_are_gone_afterwards(place: Place) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    supervisor = Supervisor([])
    supervisor.run(supervisor.stop)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


_PROGRAM = """
import signal
import sys
from pathlib import Path
from fedtune.processes import logs
from fedtune.processes.supervisor import Supervisor
from tests.support.children import Place
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests under nohup hands it down ignored
place = Place(Path(sys.argv[1]))
logs.setup("server")
Supervisor([place.spec("a", "ready"), place.spec("b", *sys.argv[2:])]).run()
"""


def program(place: Place, *words: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(place.folder), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: "b works" in place.story)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_children_and_then_the_supervisor(number: int, place: Place) -> None:
    process = program(place, "ready")
    process.send_signal(number)
    _, shown = process.communicate(timeout=20)
    assert process.returncode == 0, shown
    assert place.story[-2:] == ["b ends", "a ends"]
    assert not lives(place.pid("a"))
    assert not lives(place.pid("b"))


def test_ctrl_c_at_a_terminal_reaches_the_supervisor_alone(place: Place) -> None:
    """A terminal signals its foreground group; a Python child would end with KeyboardInterrupt, out of order."""
    process = program(place, "ready")
    os.killpg(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=20)
    assert place.story[-2:] == ["b ends", "a ends"], shown


def test_a_second_sigint_kills_what_does_not_end(place: Place) -> None:
    process = program(place, "deaf", "ready")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)  # its time of grace is 15 s
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 0
    assert not lives(place.pid("a"))
    assert not lives(place.pid("b"))


def test_a_child_that_does_not_end_in_its_time_is_killed(place: Place, supervise: Supervise) -> None:
    running = supervise(Supervisor([place.spec("a", "deaf", "ready", grace=0.2)]))
    running.until("a", "ready")
    running.end()
    assert running.state("a").last_exit == -signal.SIGKILL


def test_everything_that_children_say_comes_in_the_chosen_format_redacted_and_once(
    place: Place, tmp_path: Path
) -> None:
    key = ("say=-----BEGIN PRIVATE KEY-----", "say=MIIB", "say=-----END PRIVATE KEY-----")
    words = ("say=HF_TOKEN=hf_abcdefgh12345678", *key, "log=it is wrong", "ready")
    folder = tmp_path / "logs"
    process = program(place, *words, FEDTUNE_LOG_FORMAT="json", FEDTUNE_LOG_FOLDER=str(folder))
    process.terminate()
    _, shown = process.communicate(timeout=20)
    lines = [json.loads(line) for line in shown.splitlines()]
    own = [(line["process"], line["message"]) for line in lines if line["logger"] != "fedtune.supervisor"]
    assert own == [("b", "HF_TOKEN=[hidden]"), ("b", "it is wrong")]
    assert next(line["code"] for line in lines if line["message"] == "it is wrong") == "test.wrong"
    assert "hf_abc" not in (folder / "server.jsonl").read_text()


def test_a_childs_own_lines_are_in_its_own_file_alone(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    environment = {**place.spec("b", "log=it is wrong", "ready").environment, "FEDTUNE_LOG_FOLDER": str(folder)}
    supervisor = Supervisor([replace(place.spec("b", "log=it is wrong", "ready"), environment=environment)])
    logs.setup("server", folder)
    supervisor.run(lambda: supervisor.stop() if supervisor.states[0].status == "ready" else None, every=0.0)
    found = [(line["process"], line["message"]) for line in logs.read(folder)]
    assert found.count(("b", "it is wrong")) == 1
    assert ("server", "b is ready") in found


def test_logging_is_what_a_supervisor_does_with_its_childrens_words(
    place: Place, supervise: Supervise, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    running = supervise(Supervisor([place.spec("a", "say=a library speaks", "ready")]))
    running.until("a", "ready")
    wait_for(lambda: "a library speaks" in caplog.text)
