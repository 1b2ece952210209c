"""Logging of a process: to standard error as text or JSON, and as JSON to a file of its own that is kept small.

    FEDTUNE_LOG_FORMAT       text (default) or json, for standard error
    FEDTUNE_LOG_FOLDER       FOLDER/ROLE.jsonl, at most 6 files of 10 MB, readable by this user alone; unset: no file
    FEDTUNE_LOG_TRACEBACKS   1: traces and debug lines of fedtune; a trace can quote records, so keep it off at a site

Knows no Flower and no child; `read` reads what this wrote.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from io import FileIO, TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import TextIO

from fedtune.errors import ProcessError
from fedtune.processes.log_lines import Line, line_of, to_json, to_text, with_traces
from fedtune.processes.log_reader import read

__all__ = ["FOLDER", "FORMAT", "Line", "read", "relay", "setup", "to_text"]

FORMAT, FOLDER = "FEDTUNE_LOG_FORMAT", "FEDTUNE_LOG_FOLDER"
_FORMATS = {"text": to_text, "json": to_json}
_SIZE, _KEPT = 10_000_000, 5
_LOUD = ("httpx", "httpcore", "urllib3", "filelock", "fsspec")
logger = logging.getLogger("fedtune.logs")


def setup(role: str, folder: Path | None = None) -> None:
    """Log this process as `role`, and nothing by other ways; call it once, before anything is logged.

    `folder` is where files go when the environment names none; it is set there, for the processes that this one starts.

    Uncaught exceptions and warnings are logged as everything else. A file that cannot be written later on (disk full)
    loses its lines and disturbs nobody. Errors: `process.log-format`, `process.log-folder`.
    """
    # On a handler's failure the standard library would print the record, with its arguments and as it is.
    logging.raiseExceptions = False
    if folder is not None:
        os.environ.setdefault(FOLDER, str(folder))
    root = logging.getLogger()
    handlers: list[logging.Handler] = [_Screen(_format(), role), *_files(role)]
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("fedtune").setLevel(logging.DEBUG if with_traces() else logging.INFO)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda found: _uncaught(found.exc_type, found.exc_value, found.exc_traceback)


def relay(line: Line) -> None:
    """Show a line that another process has logged and kept in its own file."""
    record = logging.makeLogRecord({"line": line})
    screens = [handler for handler in logging.getLogger().handlers if isinstance(handler, _Screen)]
    for screen in screens:
        screen.handle(record)
    if not screens:
        sys.stderr.write(to_text(line) + "\n")


class _Formatter(logging.Formatter):
    def __init__(self, style: str, role: str) -> None:
        super().__init__()
        self._write, self._role = _FORMATS[style], role

    def format(self, record: logging.LogRecord) -> str:
        return self._write(getattr(record, "line", None) or line_of(record, self._role))


class _Screen(logging.StreamHandler[TextIO]):
    def __init__(self, style: str, role: str) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Formatter(style, role))


class _File(RotatingFileHandler):
    """A file that is opened with its first line, again after each failure, and by this user alone."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        # Without a buffer: one that a full disk does not take would grow, and be written in pieces later on.
        raw = FileIO(descriptor, "a")
        return TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


def _format() -> str:
    style = os.environ.get(FORMAT) or "text"
    if style not in _FORMATS:
        raise ProcessError("log-format", f"{FORMAT} is {style!r}", hint=f"set it to text or json: {FORMAT}=json")
    return style


def _files(role: str) -> list[logging.Handler]:
    if not os.environ.get(FOLDER):
        return []
    folder = Path(os.environ[FOLDER])
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        hint = f"make the folder, or set {FOLDER} to one that this user can write"
        raise ProcessError("log-folder", f"{folder} cannot be made ({error.strerror})", hint=hint) from error
    handler = _File(folder / f"{role}.jsonl", maxBytes=_SIZE, backupCount=_KEPT, encoding="utf-8", delay=True)
    handler.setFormatter(_Formatter("json", role))
    return [handler]


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error or kind(), trace)
    elif not issubclass(kind, SystemExit):
        logger.critical("an error that nobody expected", exc_info=(kind, error or kind(), trace))
