"""Work does not hold up the beat; what is stopped stops beating."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedtune.processes import heartbeat
from tests.support.federation import wait_for

BUSY = """
import pathlib, sys, time
from fedtune.processes import heartbeat
heartbeat._BEAT = 0.05
heartbeat.beat(pathlib.Path(sys.argv[1]))
while True:
    sum(range(100_000))
"""


def test_a_file_that_nobody_touches_grows_old(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.touch()
    assert heartbeat.is_fresh(ready)
    os.utime(ready, (time.time() - 60, time.time() - 60))
    assert not heartbeat.is_fresh(ready)


def test_a_busy_process_beats_and_a_stopped_one_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_BEAT", 0.25)
    ready = tmp_path / "ready"
    ready.touch()
    os.utime(ready, (0, 0))
    with subprocess.Popen([sys.executable, "-c", BUSY, str(ready)]) as process:
        try:
            wait_for(lambda: heartbeat.is_fresh(ready))
            process.send_signal(signal.SIGSTOP)
            wait_for(lambda: not heartbeat.is_fresh(ready))
            process.send_signal(signal.SIGCONT)
            wait_for(lambda: heartbeat.is_fresh(ready))
        finally:
            process.kill()
