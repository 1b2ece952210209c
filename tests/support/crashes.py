"""Clients of a real site that are killed: each a process of its own, stopped at a named step or at any moment.

A client tells what it does in a file, one JSON a line, each written before the act; the file outlives it. Where it
stops is chosen here, by wrapping the product's functions in the child: the product knows nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import fedtune.training.local as training
from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.flower.messages import Refusal, decode_update
from fedtune.journal.journal import Journal
from fedtune.journal.ledger import Ledger
from fedtune.run import private_files
from fedtune.simulation.workspace import open_workspace
from fedtune_client.authority import Authority
from fedtune_client.updates import Payload, digest
from fedtune_client.vault import Vault
from tests.support import processes
from tests.support.bench import Bench
from tests.support.sites import RealSite, Study, content_of

STEPS = (
    "before RESERVE",
    "RESERVE half written",
    "RESERVE not flushed",
    "after RESERVE",
    "mid-train, before noise",
    "mid-train, after noise",
    "update half in the vault",
    "in the vault, before COMMIT",
    "COMMIT half written",
    "after COMMIT",
    "Sent half written",
    "mid-send",
    "reply gone",
)
_KINDS = {b'"kind":"reserve"': "RESERVE", b'"kind":"commit"': "COMMIT", b'"kind":"update-sent"': "Sent"}
_PATIENCE = 120  # seconds; a client that nobody killed ends itself

Stop = Callable[[str], None]
Tell = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Script:
    """Rounds that a client answers in turn, and the step of the last of them at which it stops ("" for none).

    A `fault` is one of `FAULTS`: a client that is wrong, for tests of the tests.
    """

    site: Path
    rounds: tuple[int, ...]
    step: str
    story: Path
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Story:
    """What a client told: `draws` noise, `commits` to a digest, `reply` and `content` that it returned, and more."""

    lines: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> Story:
        *whole, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
        return cls(tuple(json.loads(line) for line in whole))

    def told(self, what: str, number: int | None = None) -> list[Any]:
        """Return everything of one kind, of one round or of all."""
        return [line[what] for line in self.lines if what in line and number in {None, line["round"]}]


class Clients:
    """Starts clients by forking a process that has imported everything and opened the base model, but no site."""

    def __init__(self, study: Study) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(processes._PRELOADED)  # a process of tests has one such server
        self._pipe, other = context.Pipe()
        arguments = (other, study.plan.json_text, str(study.machine_file))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        assert self._pipe.recv() == "ready"

    def start(self, script: Script) -> int:
        """Start a client and return its process id."""
        self._pipe.send(script)
        return int(self._pipe.recv())

    def ended(self, process: int) -> int:
        """Wait for a client's end and return its exit code, negative for a signal."""
        self._pipe.send(process)
        return int(self._pipe.recv())

    def killed_at_its_step(self, script: Script) -> Story:
        """SIGKILL a client at the step of its script."""
        process = self.start(script)
        _wait_for("at", script)
        os.kill(process, signal.SIGKILL)
        assert self.ended(process) == -signal.SIGKILL
        return Story.read(script.story)

    def killed_after(self, script: Script, seconds: float) -> Story:
        """SIGKILL a client some time after it was asked for its last round, wherever it is."""
        process = self.start(script)
        _wait_for("begins", script)
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        self.ended(process)
        return Story.read(script.story)

    def finished(self, *scripts: Script) -> list[Story]:
        """Run clients at the same time to their ends."""
        for process in [self.start(script) for script in scripts]:
            assert self.ended(process) == 0, [Story.read(script.story) for script in scripts]
        return [Story.read(script.story) for script in scripts]

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _wait_for(what: str, script: Script) -> None:
    while not (story := Story.read(script.story)).told(what, script.rounds[-1]):
        assert not story.told("ended"), story
        time.sleep(0.001)


def _serve(pipe: Connection, plan_text: str, machine_file: str) -> None:
    """Fork a client for each script, and reap those that are asked for."""
    torch.set_num_threads(1)
    plan, machine = StudyPlan.from_json(plan_text), Machine.load(Path(machine_file))
    study = Study(Bench(plan, machine, open_workspace(plan, machine), "", []), Path(machine_file))
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, int):
            pipe.send(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]))
            continue
        process = os.fork()
        if not process:
            _client(asked, study)
        pipe.send(process)


def _client(script: Script, study: Study) -> None:
    """Answer a script's rounds in a process of its own, which ends here."""
    signal.alarm(_PATIENCE)
    now, code = {"round": 0}, 1
    file = os.open(script.story, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(**line: Any) -> None:
        os.write(file, json.dumps(now | line).encode() + b"\n")

    def stop(step: str) -> None:
        if step == script.step and now["round"] == script.rounds[-1]:
            tell(at=step)
            signal.pause()

    try:
        _tell_and_stop(tell, stop)
        FAULTS.get(script.fault, lambda: None)()
        for number in script.rounds:
            now["round"] = number
            _answer(RealSite(script.site, study), number, tell, stop)
        code = 0
    except BaseException:  # noqa: BLE001 - whoever started it reads what went wrong
        tell(failed=traceback.format_exc())
    finally:
        tell(ended=code)
        os._exit(code)


def _answer(site: RealSite, number: int, tell: Tell, stop: Stop) -> None:
    tell(begins=number)
    reply = site.ask("train", number).content
    answer = decode_update(reply, site.study.plan.sha256)
    if isinstance(answer, Refusal):
        tell(refused=answer.code)
        return
    content = hashlib.sha256(repr(content_of(reply)).encode()).hexdigest()
    tell(reply=digest(Payload(answer.state, answer.events).to_bytes()), content=content)
    stop("reply gone")


def _tell_and_stop(tell: Tell, stop: Stop) -> None:
    """Wrap what a round does; the process ends with it, so nothing is put back."""

    def draws(*_arguments: Any) -> None:
        stop("mid-train, before noise")
        tell(draws=1)

    _around(training, "add_noise", draws, lambda *_: stop("mid-train, after noise"))
    _around(Authority, "reserve", lambda *_: stop("before RESERVE"), lambda *_: stop("after RESERVE"))
    _around(Authority, "commit", lambda *given: tell(commits=digest(given[-1])), lambda *_: stop("after COMMIT"))
    _around(Ledger, "commit", lambda *_: stop("in the vault, before COMMIT"))
    _around(Ledger, "sent", after=lambda *_: stop("mid-send"))
    _write_in_halves(stop)


def _around(
    owner: Any, name: str, before: Callable[..., Any] = lambda *_: None, after: Callable[..., Any] = lambda *_: None
) -> None:
    wrapped = getattr(owner, name)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        before(*arguments)
        found = wrapped(*arguments, **named)
        after(*arguments)
        return found

    setattr(owner, name, wrapper)


def _forget_reserve() -> None:
    name = "_write"
    write = getattr(Journal, name)
    setattr(Journal, name, lambda journal, data: None if b'"kind":"reserve"' in data else write(journal, data))


def _forget_updates() -> None:
    name = "has"
    setattr(Vault, name, lambda *_: False)


FAULTS: dict[str, Callable[[], None]] = {
    "no RESERVE on disk": _forget_reserve,
    "no update in the vault": _forget_updates,
}


def _write_in_halves(stop: Stop) -> None:
    """Write records and updates in two halves with a stop between them, and another before the flush."""
    write, write_new = "_write", "write_new"
    write_all, write_item = getattr(Journal, write), getattr(private_files, write_new)

    def halves(journal: Any, data: bytes) -> None:
        name = next((name for kind, name in _KINDS.items() if kind in data), "")
        if name:
            data = data[os.write(journal._descriptor, data[: len(data) // 2]) :]
            stop(f"{name} half written")
            data = data[os.write(journal._descriptor, data) :]
            stop(f"{name} not flushed")
        write_all(journal, data)

    def half_an_item(path: Path, chunks: Any) -> None:
        data = b"".join(chunks)
        if path.name.startswith(".training-"):
            path.write_bytes(data[: len(data) // 2])
            stop("update half in the vault")
            path.unlink()
        write_item(path, [data])

    setattr(Journal, write, halves)
    setattr(private_files, write_new, half_an_item)
