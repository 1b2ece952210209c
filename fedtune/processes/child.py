"""One process and what became of it: starting, ready, waiting to be started again, stopped. Never waits for it.

A child leads a session of its own: a terminal's Ctrl-C reaches the supervisor alone, and what a child has started is
killed with it. It is ready when its ready file names its process, which is why the file is removed before each start.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtune.errors import ProcessError
from fedtune.processes import logs
from fedtune.processes.backoff import Backoff
from fedtune.processes.lifeline import Lifeline
from fedtune.processes.log_lines import Line
from fedtune.processes.output import Output
from fedtune.processes.silence import Silence

logger = logging.getLogger("fedtune.supervisor")
Status = Literal["starting", "ready", "waiting", "stopped"]
_UNUSABLE = 2  # exit code: the settings cannot be used
_PREDECESSOR = 15.0  # seconds; a child whose supervisor was killed ends within 10


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to start and how to see that it works; times in seconds.

    `environment` is the child's whole environment: nothing of the supervisor's is added but the lifeline and the log's
    format. `ready` is a JSON file with the child's "pid", written when it works; a child without one is ready at once.
    After SIGTERM a child has `grace` to end. One that is not ready within `starting` is killed and started again, and
    so is one whose `probe` (asked every `probe_every`, in a thread) has not returned True for `silence`: it has a time
    limit of its own, and is what notices a process that was stopped (SIGSTOP).
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ready: Path | None = None
    grace: float = 15.0
    starting: float = 60.0
    probe: Callable[[], bool] | None = None
    probe_every: float = 5.0
    silence: float = 60.0


@dataclass(frozen=True, slots=True)
class ChildState:
    """A child at one moment; `since` and `next_start` in seconds of Unix time, `last_exit` negative for a signal."""

    name: str
    status: Status
    pid: int | None
    restarts: int
    last_exit: int | None
    since: float
    next_start: float | None


class Child:
    """A child's life; `go_on` returns at once, `stop` when the child has ended."""

    def __init__(self, spec: ChildSpec, backoff: Backoff) -> None:
        self.spec = spec
        self._backoff = backoff
        self._process: subprocess.Popen[bytes] | None = None
        self._output: Output | None = None
        self._silence: Silence | None = None
        self._status: Status = "waiting"
        self._since = time.time()
        self._starts = 0
        self._last_exit: int | None = None
        self._pause = 0.0
        self._due = self._started = self._looked = time.monotonic()
        self._ready_since: float | None = None
        self._predecessor = _pid(spec.ready)
        self._killed = self._waited = self.was_ready = False

    @property
    def state(self) -> ChildState:
        """The child now; one whose turn has not come yet waits without a time."""
        waits = self._status == "waiting" and self._starts > 0
        return ChildState(
            name=self.spec.name,
            status=self._status,
            pid=self._process.pid if self._process else None,
            restarts=max(0, self._starts - 1),
            last_exit=self._last_exit,
            since=self._since,
            next_start=time.time() + self._due - time.monotonic() if waits else None,
        )

    def go_on(self, lifeline: Lifeline) -> None:
        """See what became of the child, and start it when that is due. Error: `process.not-started`."""
        now = time.monotonic()
        if self._process is not None:
            self._look(self._process, now)
        elif now >= self._due and not self._outlived(now):
            self._start(lifeline, now)
        self._looked = now

    def stop(self, at_once: Callable[[], bool]) -> None:
        """End the child: SIGTERM, its time of grace (none when `at_once`), then SIGKILL to all that it has started."""
        process, self._process = self._process, None
        self._close_probe()
        if process is not None:
            self._last_exit = _end(process, self.spec.grace, at_once)
            if self._last_exit is None:
                logger.error("%s cannot be killed (process %d)", self.spec.name, process.pid)
        self._become("stopped")

    def _start(self, lifeline: Lifeline, now: float) -> None:
        self._starts += 1
        self._started, self._ready_since, self._killed = now, None, False
        if self.spec.ready is not None:
            with suppress(OSError):
                self.spec.ready.unlink(missing_ok=True)
        try:
            self._process = _popen(self.spec, lifeline)
        except OSError as error:
            self._last_exit = None
            self._fail(f"cannot be started: {error.strerror}", now, final=self._starts == 1)
            return
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        self._output = Output(self.spec.name, self._process.stdout)
        self._become("starting")
        logger.info("%s is process %d", self.spec.name, self._process.pid)

    def _look(self, process: subprocess.Popen[bytes], now: float) -> None:
        code = process.poll()
        if code is not None:
            self._ended(process, code, now)
        elif self._killed:
            return
        elif self._status == "starting":
            if self.spec.ready is None or _pid(self.spec.ready) == process.pid:
                self._become_ready(now)
            elif now - self._started > self.spec.starting:
                self._kill(process, f"is not ready after {self.spec.starting:.0f} s")
        elif self._silence and self._silence.after(now - self._looked) > self.spec.silence:
            self._kill(process, f"has not answered for {self.spec.silence:.0f} s")

    def _kill(self, process: subprocess.Popen[bytes], why: str) -> None:
        self._killed = True
        logger.error("%s %s and is killed", self.spec.name, why)
        _kill_group(process.pid)

    def _become_ready(self, now: float) -> None:
        self._ready_since = now
        self.was_ready = True
        self._become("ready")
        logger.info("%s is ready", self.spec.name)
        if self.spec.probe is not None:
            self._silence = Silence(self.spec.probe, self.spec.probe_every)

    def _ended(self, process: subprocess.Popen[bytes], code: int, now: float) -> None:
        _kill_group(process.pid)
        self._process, self._last_exit = None, code
        self._close_probe()
        # Without a ready file there is nothing but time to tell a child that works from one that cannot.
        settled = self.was_ready if self.spec.ready else now - self._started >= self.spec.starting
        self._fail(f"ended with {_exit_text(code)}", now, final=code == _UNUSABLE and self._starts == 1 and not settled)

    def _fail(self, what: str, now: float, *, final: bool) -> None:
        """Wait for the next start, or end it all when the first one shows that no start can succeed."""
        if final:
            raise _not_started(f"{self.spec.name} {what}", self._output.last() if self._output else None)
        stayed = now - self._ready_since if self._ready_since is not None else 0.0
        self._pause = self._backoff.after(self._pause, stayed)
        self._due = now + self._pause
        self._become("waiting")
        logger.warning("%s %s; it starts again in %.0f s", self.spec.name, what, self._pause)

    def _outlived(self, now: float) -> bool:
        """Whether the child of a supervisor that was killed still lives: it ends soon, and frees ports and folders."""
        pid = self._predecessor
        if self._starts or pid is None or now - self._started > _PREDECESSOR or not _lives(pid):
            return False
        if not self._waited:
            logger.info("%s starts when process %d of an earlier supervisor has ended", self.spec.name, pid)
            self._waited = True
        return True

    def _close_probe(self) -> None:
        if self._silence is not None:
            self._silence.close()
            self._silence = None

    def _become(self, status: Status) -> None:
        if status != self._status:
            self._status, self._since = status, time.time()


def _not_started(what: str, last: Line | None) -> ProcessError:
    if last is None:
        return ProcessError("not-started", what, hint="see whether the program is installed")
    code = f" [{last['code']}]" if "code" in last else ""
    hint = last.get("hint", "mend what its last line names, then start again")
    return ProcessError("not-started", f"{what}: {last['message']}{code}", hint=str(hint))


def _popen(spec: ChildSpec, lifeline: Lifeline) -> subprocess.Popen[bytes]:
    ours = {logs.FORMAT: "json", "PYTHONUNBUFFERED": "1", **lifeline.variables}
    return subprocess.Popen(  # noqa: S603 - a role's own program
        spec.command,
        env={**spec.environment, **ours},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=lifeline.pass_fds,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes], grace: float, at_once: Callable[[], bool]) -> int | None:
    process.terminate()
    deadline = time.monotonic() + grace
    while process.poll() is None and time.monotonic() < deadline and not at_once():
        time.sleep(0.02)
    _kill_group(process.pid)
    try:
        return process.wait(5)
    except subprocess.TimeoutExpired:
        return None


def _kill_group(leader: int) -> None:
    """Kill what a child has started, and the child: a group keeps its number while any process is in it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _pid(ready: Path | None) -> int | None:
    """Return the process that a ready file names, if there is one."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return int(json.loads(ready.read_bytes())["pid"]) if ready is not None else None
    return None


def _lives(pid: int) -> bool:
    with suppress(OSError, OverflowError):
        os.kill(pid, 0)
        return pid > 0
    return False


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
