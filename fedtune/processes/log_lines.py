"""One line of a log: its fields, as JSON for programs and as text for people. Knows no file and no stream.

    {"time": "2026-03-01T12:00:00.000Z", "level": "INFO", "logger": "fedtune.link", "process": "link", "message": "…"}

and `code`, `hint`, `study`, `site`, `round`, where a record was logged with `extra={…}`. Of an exception a line has its
code or its class in `error` and the places that it passed in `at`, not its text: a trace at a site can quote records.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.display import printable
from fedtune.errors import FedtuneError
from fedtune.processes.redaction import redact

TRACEBACKS = "FEDTUNE_LOG_TRACEBACKS"
_BASE = ("time", "level", "logger", "process", "message")
_EXTRA = ("code", "hint", "study", "site", "round")
_FIELDS = (*_BASE, *_EXTRA, "error", "at", "trace")
_LONGEST = 16_000
_FRAMES = 5

Line = dict[str, Any]


def with_traces() -> bool:
    """Return whether this machine's operator wants traces in the log, which can then hold parts of records."""
    return os.environ.get(TRACEBACKS) == "1"


def line_of(record: logging.LogRecord, process: str) -> Line:
    """Return a record as a line, redacted; a record of a child's own output says of which (`extra={"child": NAME}`)."""
    line: Line = {
        "time": _time(record.created),
        "level": record.levelname,
        "logger": record.name,
        "process": getattr(record, "child", process),
        "message": _message(record),
    }
    line |= {name: getattr(record, name) for name in _EXTRA if getattr(record, name, None) not in {None, ""}}
    if record.exc_info and isinstance(record.exc_info[1], BaseException):
        line |= _exception(record.exc_info[1])
    return _clean(line)


def to_json(line: Mapping[str, Any]) -> str:
    """Return a line as JSON."""
    return json.dumps(line, ensure_ascii=False, default=str)


def to_text(line: Mapping[str, Any]) -> str:
    """Return a line for people: one line of text, and indented ones where a message has several.

    Control characters are escaped, so that nothing in a message acts on a terminal or looks like another line.
    """
    time = str(line.get("time", ""))[:19].replace("T", " ")
    first, *further = printable(line.get("message", "")).splitlines() or [""]
    if "trace" in line:
        further += printable(line["trace"]).splitlines()
    known = [f"{name}={line[name]}" for name in ("study", "site", "round", "error", "at") if name in line]
    if "code" in line:
        failed = line.get("level") in {"ERROR", "CRITICAL"}
        first = f"error[{printable(line['code'])}]: {first}" if failed else f"{first} [{printable(line['code'])}]"
    hint = [f"hint: {line['hint']}"] if "hint" in line else []
    head = f"{time}Z {line.get('level', ''):7} {line.get('process', '')}: {first}"
    return "\n    ".join([" ".join([head, *map(printable, known)]), *further, *map(printable, hint)])


def parse(raw: bytes | str) -> Line | None:
    """Return the line that a process of ours wrote, or None for anything else (a torn line, a library's print)."""
    try:
        found = json.loads(raw)
        moment(found)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not all(isinstance(found.get(name), str) for name in _BASE):
        return None
    return _clean({name: found[name] for name in _FIELDS if name in found})


def moment(line: Mapping[str, Any]) -> datetime:
    """Return a line's time, with its zone."""
    found = datetime.fromisoformat(line["time"])
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - arguments that do not fit, or whose repr raises
        return f"{record.msg} (with other arguments than it says)"


def _exception(error: BaseException) -> Line:
    found: Line = {"error": error.code if isinstance(error, FedtuneError) else type(error).__name__}
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    if frames:
        found["at"] = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    if with_traces():
        found["trace"] = "".join(traceback.format_exception(error)).rstrip()
    return found


def _clean(line: Line) -> Line:
    """Redact, then cut: a secret that is cut first is no longer recognised."""
    return {name: _short(redact(value)) if isinstance(value, str) else value for name, value in line.items()}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"
