"""What the site's processes have logged, as one log."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from tests.support.runs import process

if TYPE_CHECKING:
    from tests.client.commands.conftest import Place


def write(place: Place, role: str, second: int, message: str) -> None:
    folder = place.site / "logs"
    folder.mkdir(exist_ok=True)
    line = {"time": f"2026-03-01T12:00:{second:02d}.000Z", "level": "INFO", "logger": "x", "process": role}
    with (folder / f"{role}.jsonl").open("a") as file:
        file.write(json.dumps(line | {"message": message}) + "\n")


def test_lines_of_all_processes_stand_in_the_order_of_time(begun: Place) -> None:
    write(begun, "node", 1, "first")
    write(begun, "node", 3, "third")
    write(begun, "executor", 2, "second")
    lines = begun.done("logs").out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["first", "second", "third"]
    assert [
        json.loads(line)["message"] for line in begun.done("logs", "-n", "2", "--format", "json").out.splitlines()
    ] == [
        "second",
        "third",
    ]
    assert begun.done("logs", "--process", "executor").out.count("\n") == 1


def test_a_site_that_never_ran_says_so(begun: Place) -> None:
    assert "error[process.no-logs]" in begun.run("logs").err


def test_what_is_written_later_is_shown_while_it_is_followed(begun: Place) -> None:
    write(begun, "node", 1, "old")
    write(begun, "node", 2, "newest")
    running = process("client", "logs", "-f", "-n", "1", "--site", str(begun.site))
    assert running.stdout is not None
    try:
        assert running.stdout.readline().endswith("newest\n")
        time.sleep(0.1)
        write(begun, "executor", 5, "later")
        assert running.stdout.readline().endswith("later\n")
    finally:
        running.kill()
        running.communicate()
