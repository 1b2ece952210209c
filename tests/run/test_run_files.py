from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import RunError
from fedtune.run.files import append_line, cut_torn_line, disk_errors, make_folder, read_lines, write_whole

FULL = Path("/dev/full")


def test_a_file_is_written_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_whole(file, b"old")
    write_whole(file, b"new content")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"plan.json": b"new content"}


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    code = (
        "import sys, pathlib; from fedtune.run.files import write_whole\n"
        "contents = [bytes([65 + n]) * 3_000_000 for n in range(2)]\n"
        "while True:\n"
        "    for content in contents:\n"
        "        write_whole(pathlib.Path(sys.argv[1]), content); print('x', flush=True)\n"
    )
    for attempt in range(6):
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        for _ in range(attempt + 1):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert file.read_bytes() in {b"A" * 3_000_000, b"B" * 3_000_000}


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file_and_the_way_on(tmp_path: Path) -> None:
    partial = tmp_path / ".summary.json.partial"
    partial.symlink_to(FULL)
    (tmp_path / "summary.json").write_text("old")
    with pytest.raises(RunError, match=f"no space left to write {tmp_path / 'summary.json'}") as caught:
        write_whole(tmp_path / "summary.json", b"x" * 10_000)
    assert caught.value.code == "run.disk-full"
    assert "--resume" in caught.value.hint
    assert (tmp_path / "summary.json").read_text() == "old"
    with pytest.raises(RunError, match="no space left"):
        append_line(FULL, "line")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "run.disk-full"),
        (errno.EDQUOT, "run.disk-full"),
        (errno.EACCES, "run.unwritable"),
        (errno.EROFS, "run.unwritable"),
        (errno.EEXIST, "run.unwritable"),
        (errno.ENAMETOOLONG, "run.unwritable"),
        (errno.EIO, "run.unwritable"),
    ],
)
def test_every_refusal_of_the_system_names_the_path_and_a_hint(tmp_path: Path, number: int, code: str) -> None:
    with pytest.raises(RunError, match=str(tmp_path)) as caught, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.code == code
    assert caught.value.hint


def test_a_folder_where_a_file_is_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match=str(path)):
            make_folder(path)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_lines_come_back_in_order_without_a_torn_one(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert read_lines(file) == []
    for number in range(3):
        append_line(file, f'{{"round": {number}}}')
    with file.open("ab") as stream:
        stream.write(b'{"round": 3')
    assert [line["round"] for line in read_lines(file)] == [0, 1, 2]


@given(kept=st.lists(st.integers(), max_size=4), torn=st.binary(max_size=20).filter(lambda part: b"\n" not in part))
def test_cutting_removes_the_torn_line_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, kept: list[int], torn: bytes
) -> None:
    file = tmp_path_factory.mktemp("cut") / "lines.jsonl"
    whole = "".join(f"{number}\n" for number in kept).encode()
    file.write_bytes(whole + torn)
    cut_torn_line(file)
    assert file.read_bytes() == whole
    append_line(file, "7")
    assert read_lines(file) == [*kept, 7]


def test_damage_before_the_last_line_is_never_overlooked(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(b'{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(RunError, match="damaged before its last line") as caught:
        read_lines(file)
    assert caught.value.code == "run.damaged"
