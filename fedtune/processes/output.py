"""What a child prints: its log lines are shown as this process's own are, anything else is logged as its output.

A child logs JSON on standard error and keeps its lines in its own file; a library's prints, and what the interpreter
says when it cannot go on, have no other place than this. Knows no process, only the reading end of a pipe.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import IO

from fedtune.processes import logs
from fedtune.processes.log_lines import Line, parse
from fedtune.processes.redaction import redact

_LONGEST = 256_000
_BEGIN, _END = b"-----BEGIN ", b"-----END "
logger = logging.getLogger("fedtune.output")


class Output:
    """Reads a pipe to its end in a thread of its own, so that a child never waits for its supervisor."""

    def __init__(self, child: str, pipe: IO[bytes], show: Callable[[Line], None] = logs.relay) -> None:
        self._child, self._pipe, self._show = child, pipe, show
        self._last: Line | None = None
        self._error: Line | None = None
        self._in_key = False
        self._thread = threading.Thread(target=self._read, name=f"output-{child}", daemon=True)
        self._thread.start()

    def last(self, patience: float = 1.0) -> Line | None:
        """Return the last error that the child logged, else the last line; waits for the pipe's end a moment."""
        self._thread.join(patience)
        return self._error or self._last

    def _read(self) -> None:
        with self._pipe:
            while raw := self._pipe.readline(_LONGEST):
                self._take(raw)

    def _take(self, raw: bytes) -> None:
        line = parse(raw)
        if line is not None:
            self._last = line
            if line["level"] in {"ERROR", "CRITICAL"}:
                self._error = line
            self._show(line)
        elif self._is_public(raw) and (text := raw.decode(errors="backslashreplace").rstrip()):
            self._last = {"message": redact(text)}
            logger.info("%s", text, extra={"child": self._child})

    def _is_public(self, raw: bytes) -> bool:
        """Return False for the lines of a private key, which alone look like nothing."""
        if _BEGIN in raw and b"PRIVATE KEY" in raw:
            self._in_key = True
        if self._in_key and _END in raw:
            self._in_key = False
            return False
        return not self._in_key
