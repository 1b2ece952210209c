from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from itertools import islice
from logging.handlers import RotatingFileHandler
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ProcessError
from fedtune.processes import logs

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


def raw(second: float, message: str, role: str = "link") -> str:
    time = (START + timedelta(seconds=second)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"time": time, "level": "INFO", "logger": "x", "process": role, "message": message}) + "\n"


def put(folder: Path, name: str, *lines: str) -> None:
    (folder / name).write_text("".join(lines))


def messages(lines: Iterator[logs.Line], count: int | None = None) -> list[str]:
    return [line["message"] for line in islice(lines, count)]


def test_roles_and_rotated_files_are_one_log_in_the_order_of_time(tmp_path: Path) -> None:
    put(tmp_path, "link.jsonl.2", raw(0, "a"), raw(3, "d"))
    put(tmp_path, "link.jsonl.1", raw(4, "e"))
    put(tmp_path, "link.jsonl", raw(6, "g"))
    put(tmp_path, "executor.jsonl.1", raw(1, "b", "executor"), raw(2, "c", "executor"))
    put(tmp_path, "executor.jsonl", raw(5, "f", "executor"), raw(7, "h", "executor"))
    put(tmp_path, "notes.txt", raw(0, "no log"))
    assert messages(logs.read(tmp_path)) == list("abcdefgh")


def test_roles_and_a_time_choose_lines(tmp_path: Path) -> None:
    put(tmp_path, "link.jsonl", raw(0, "a"), raw(10, "b"))
    put(tmp_path, "node.jsonl", raw(5, "x", "node"))
    assert messages(logs.read(tmp_path, roles=["link"])) == ["a", "b"]
    east = START.astimezone(timezone(timedelta(hours=9)))
    assert messages(logs.read(tmp_path, since=east + timedelta(seconds=5))) == ["x", "b"]


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    put(
        tmp_path, "link.jsonl", "Traceback\n", raw(0, "a"), '{"time": "2026"}\n', "\x00\x00\n", raw(1, "b"), '{"time": '
    )
    assert messages(logs.read(tmp_path)) == ["a", "b"]


def test_no_folder_and_an_unknown_role_are_said(tmp_path: Path) -> None:
    put(tmp_path, "link.jsonl", raw(0, "a"))
    with pytest.raises(ProcessError) as caught:
        logs.read(tmp_path / "none")
    assert caught.value.code == "process.no-logs"
    with pytest.raises(ProcessError) as caught:
        logs.read(tmp_path, roles=["lnk"])
    assert caught.value.code == "process.unknown-role"
    assert "link" in caught.value.hint


def test_following_sees_lines_torn_in_two_new_roles_and_a_rotation(tmp_path: Path) -> None:
    put(tmp_path, "link.jsonl", raw(0, "a"))
    lines = logs.read(tmp_path, follow=True)
    assert messages(lines, 1) == ["a"]
    whole = raw(1, "b")
    with (tmp_path / "link.jsonl").open("a") as file:
        file.write(whole[:20])
        file.flush()
        later = threading.Timer(0.4, lambda: (file.write(whole[20:] + raw(2, "c")), file.flush()))
        later.start()
        assert messages(lines, 2) == ["b", "c"]
        later.join()
        file.write(raw(3, "d"))
    (tmp_path / "link.jsonl").rename(tmp_path / "link.jsonl.1")
    put(tmp_path, "link.jsonl", raw(4, "e"))
    put(tmp_path, "node.jsonl", raw(5, "f", "node"))
    assert messages(lines, 3) == ["d", "e", "f"]


def test_following_ends_when_it_is_no_longer_wanted(tmp_path: Path) -> None:
    put(tmp_path, "link.jsonl", raw(0, "a"))
    assert messages(logs.read(tmp_path, follow=True, going=lambda: False)) == ["a"]


def test_no_line_is_lost_or_told_twice_while_files_rotate(tmp_path: Path) -> None:
    """Six rotations and more happen between looks of the reader, or during one."""
    handler = RotatingFileHandler(tmp_path / "link.jsonl", maxBytes=20_000, backupCount=30)
    writing = threading.Event()

    def write() -> None:
        for number in range(2000):
            record = logging.makeLogRecord({"msg": raw(number, str(number)).rstrip()})
            handler.emit(record)
        writing.set()

    thread = threading.Thread(target=write)
    lines = logs.read(tmp_path, follow=True, going=lambda: not writing.is_set())
    thread.start()
    found = messages(lines)
    thread.join()
    handler.close()
    assert found == [str(number) for number in range(len(found))]
    assert messages(logs.read(tmp_path)) == [str(number) for number in range(2000)]


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from(["link", "node", "executor"])), max_size=40))
def test_every_line_is_told_once_whatever_clocks_say(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    for index, (second, role) in enumerate(written):
        with (folder / f"{role}.jsonl").open("a") as file:
            file.write(raw(second, str(index), role))
    found = messages(logs.read(folder))
    assert sorted(map(int, found)) == list(range(len(written)))
