"""A command in a terminal of its own: questions are answered as they appear, as a person does."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import ROOT

_CHILD = """
import fcntl, termios
from fedtune.cli import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # its standard input is the terminal that passphrases are read from
raise SystemExit(main())
"""


@dataclass(frozen=True, slots=True)
class Screen:
    """What stood on the terminal (standard output and errors together) and the exit code."""

    code: int
    text: str


def in_terminal(*arguments: str, answers: list[tuple[str, str]], folder: Path) -> Screen:
    """Run `fedtune` in a terminal and give each answer when its question has appeared."""
    master, slave = os.openpty()
    places = [str(ROOT), str(ROOT / "server"), str(ROOT / "client")]
    running = subprocess.Popen(
        [sys.executable, "-c", _CHILD, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=folder,
        start_new_session=True,
    )
    os.close(slave)
    text, seen, waiting, until = "", 0, list(answers), time.monotonic() + 120
    while time.monotonic() < until:
        text += _read(master)
        if waiting and (at := text.find(waiting[0][0], seen)) >= 0:
            seen = at + len(waiting[0][0])
            time.sleep(0.1)  # the terminal stops echoing after the question is written
            os.write(master, waiting.pop(0)[1].encode() + b"\n")
        elif running.poll() is not None:
            break
    running.kill()
    text += _read(master)
    os.close(master)
    return Screen(running.wait(), text)


def _read(master: int) -> str:
    waiting = select.poll()  # select() knows no descriptor above 1,023
    waiting.register(master, select.POLLIN)
    if not waiting.poll(50):
        return ""
    try:
        return os.read(master, 65536).decode(errors="replace")
    except OSError:  # the other end is closed
        return ""
