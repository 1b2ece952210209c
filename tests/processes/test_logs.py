from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import DataError, ProcessError
from fedtune.processes import logs
from fedtune.processes.log_lines import line_of, parse, to_json, to_text
from tests.support.children import ROOT

CANARY = "patient 4711 has a secret"
pytestmark = pytest.mark.usefixtures("_plain_logging")
logger = logging.getLogger("fedtune.test")


def record(message: str, *args: object, **extra: Any) -> logging.LogRecord:
    return logger.makeRecord("fedtune.test", logging.INFO, "file", 1, message, args, None, extra=extra)


def file_lines(folder: Path, role: str = "link") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{role}.jsonl").read_text().splitlines()]


def fails(text: str = CANARY) -> None:
    raise ValueError(text)


def test_text_goes_to_the_screen_and_json_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_LOG_FOLDER", str(tmp_path / "logs"))
    logs.setup("link")
    logger.info("round %d begins", 3, extra={"study": "s", "site": "a", "round": 3, "code": "x.y", "other": "dropped"})
    assert capsys.readouterr().err.endswith("Z INFO    link: round 3 begins [x.y] study=s site=a round=3\n")
    (line,) = file_lines(tmp_path / "logs")
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "fedtune.test",
        "process": "link",
        "message": "round 3 begins",
        "code": "x.y",
        "study": "s",
        "site": "a",
        "round": 3,
    }


def test_the_screen_takes_json_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_LOG_FORMAT", "json")
    logs.setup("node")
    logger.warning("two\nlines")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "two\nlines"


def test_set_up_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("node")
    logs.setup("node")
    logger.warning("once")
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize("style", ["text", "json"])
def test_an_exceptions_text_is_logged_only_where_the_operator_wants_it(
    style: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_LOG_FORMAT", style)
    for wanted in ("0", "1"):
        monkeypatch.setenv("FEDTUNE_LOG_TRACEBACKS", wanted)
        logs.setup("site")
        try:
            fails()
        except ValueError:
            logger.exception("it failed")
        shown = capsys.readouterr().err
        assert (CANARY in shown) is (wanted == "1")
        assert "ValueError" in shown
        assert "test_logs.py:" in shown


def test_of_an_error_of_ours_the_code_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("site")
    logger.error("it failed", exc_info=DataError("missing-column", CANARY))
    shown = capsys.readouterr().err
    assert "error=data.missing-column" in shown
    assert CANARY not in shown


def test_an_error_that_ends_a_process_leaves_no_text_and_no_trace() -> None:
    program = f"from fedtune.processes import logs\nlogs.setup('site')\nraise ValueError({CANARY!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(**changes: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", program]
        return subprocess.run(words, env=environment | changes, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 1
    assert "CRITICAL site: an error that nobody expected error=ValueError at=<string>:3" in done.stderr
    assert CANARY not in done.stderr
    assert CANARY in run(FEDTUNE_LOG_TRACEBACKS="1").stderr


def test_an_error_that_ends_a_thread_leaves_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("site")
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    shown = capsys.readouterr().err
    assert "error=ValueError" in shown
    assert CANARY not in shown


def test_warnings_are_lines_as_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("site")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
    assert "WARNING site: " in capsys.readouterr().err


def test_secrets_are_hidden_in_messages_arguments_and_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_LOG_FOLDER", str(tmp_path))
    logs.setup("link")
    secret = "9a" * 32
    logger.warning("headers: %s", {"authorization": f"Bearer {secret}"})
    logger.warning("%s", secret, extra={"study": secret})
    shown = capsys.readouterr().err + (tmp_path / "link.jsonl").read_text()
    assert secret not in shown
    assert "[hidden]" in shown
    assert shown.count("9a9a9a9a9a9a…") == 4


def test_arguments_that_do_not_fit_are_said_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("link")
    logger.warning("%d files", CANARY)
    shown = capsys.readouterr().err
    assert "%d files (with other arguments than it says)" in shown
    assert CANARY not in shown


def test_a_file_that_cannot_be_opened_loses_its_lines_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDTUNE_LOG_FOLDER", str(tmp_path))
    logs.setup("link")
    (tmp_path / "link.jsonl").mkdir()
    logger.warning("lost")
    (tmp_path / "link.jsonl").rmdir()
    logger.warning("kept")
    assert [line["message"] for line in file_lines(tmp_path)] == ["kept"]
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == ["lost", "kept"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is full")
def test_a_full_disk_disturbs_nobody_and_prints_nothing_of_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.jsonl").symlink_to("/dev/full")
    monkeypatch.setenv("FEDTUNE_LOG_FOLDER", str(tmp_path))
    logs.setup("link")
    logger.warning("token=%s", CANARY)
    shown = capsys.readouterr().err
    assert shown.endswith("WARNING link: token=[hidden] 4711 has a secret\n")
    assert len(shown.splitlines()) == 1


def test_files_are_this_users_alone_and_rotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_LOG_FOLDER", str(tmp_path / "logs"))
    monkeypatch.setattr(logs, "_SIZE", 2_000)
    logs.setup("link")
    for number in range(200):
        logger.info("line %d", number)
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert names == ["link.jsonl", *(f"link.jsonl.{number}" for number in range(1, 6))]
    assert all(path.stat().st_size <= 2_000 for path in (tmp_path / "logs").iterdir())
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "logs").iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700


@pytest.mark.parametrize(("name", "value", "code"), [("FORMAT", "xml", "log-format"), ("FOLDER", "{}/x", "log-folder")])
def test_settings_that_cannot_be_used_are_said(
    name: str, value: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(f"FEDTUNE_LOG_{name}", value.format(tmp_path / "file"))
    with pytest.raises(ProcessError) as caught:
        logs.setup("link")
    assert caught.value.code == f"process.{code}"
    assert f"FEDTUNE_LOG_{name}" in caught.value.hint


def test_a_childs_line_is_shown_as_it_was_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("server")
    logs.relay(line_of(record("it works", code="a.b"), "link"))
    assert capsys.readouterr().err.endswith("INFO    link: it works [a.b]\n")


def test_nothing_in_a_message_acts_on_a_terminal_or_looks_like_another_line() -> None:
    forged = "\x1b[2Jgone\n2026-01-01 00:00:00Z INFO    link: all is well\r\u2028\u202e"
    first, *further = to_text(line_of(record("%s", forged), "node")).split("\n")
    assert "\\x1b[2Jgone" in first
    assert further
    assert all(line.startswith("    ") for line in further)
    assert "\r" not in "".join(further)


def test_an_enormous_message_is_cut_after_its_secrets_are_hidden() -> None:
    secret = "7c" * 40
    line = line_of(record("%s", "x" * 15_990 + secret + "y" * 100_000), "link")
    assert len(line["message"]) < 17_000
    assert "7c7c7c7c7c7c7" not in line["message"]


@given(message=st.text(), study=st.text() | st.integers())
def test_what_is_logged_is_read_again(message: str, study: str | int) -> None:
    line = line_of(record("%s", message, study=study), "link")
    raw = to_json(line).encode(errors="backslashreplace")
    assert b"\n" not in raw
    assert parse(raw) is not None


@given(
    st.binary() | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_what_is_no_line_of_ours_is_none(raw: bytes) -> None:
    assert parse(raw) is None


@pytest.mark.parametrize(
    "change", [{"time": "yesterday"}, {"time": 5}, {"message": None}, {"level": 1}, {"process": ["x"]}, {"logger": {}}]
)
def test_a_line_with_another_fields_type_is_none(change: dict[str, Any]) -> None:
    line = line_of(record("whole"), "link")
    assert parse(to_json(line)) == line
    assert parse(to_json(line | change)) is None
