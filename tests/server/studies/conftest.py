"""A folder of studies, and a SuperLink in memory that does what its control API promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.errors import TransportError
from fedtune.flower.bundle import Bundle
from fedtune.flower.submission import RunFacts
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.studies.conductor import Conductor
from fedtune_server.studies.store import StoredStudy, StudyStore
from tests.client.policy.conftest import plan_text

START = datetime(2026, 11, 22, 12, tzinfo=UTC)


@dataclass
class Clock:
    time: datetime = START

    def __call__(self) -> datetime:
        return self.time

    def seconds(self) -> float:
        return (self.time - START).total_seconds()

    def later(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@dataclass
class Link:
    """Runs as Flower keeps them; one that is stopped is finished at once, and ends that are told are believed."""

    clock: Clock
    known: list[RunFacts] = field(default_factory=list)
    calls: int = 0

    def runs(self) -> tuple[RunFacts, ...]:
        self.calls += 1
        return tuple(reversed(self.known))

    def start(self, bundle: Bundle) -> int:
        return self.add(bundle.sha256)

    def add(self, sha256: str, status: str = "pending") -> int:
        number = 100 + len(self.known)
        self.known.append(RunFacts(number, sha256, status, "", "", self.clock().isoformat(), ""))
        return number

    def stop(self, run: int) -> bool:
        if self.of(run).status == "finished":
            raise TransportError("run-finished", "it has finished")
        self.end(run, outcome="stopped")
        return True

    def of(self, number: int) -> RunFacts:
        return next(run for run in self.known if run.number == number)

    def change(self, number: int, **changes: str) -> None:
        self.known = [replace(run, **changes) if run.number == number else run for run in self.known]  # type: ignore[arg-type]

    def begin(self, number: int) -> None:
        self.change(number, status="running")

    def end(self, number: int, details: str = "", outcome: str = "failed") -> None:
        at = self.clock().isoformat()
        self.change(number, status="finished", outcome=outcome, details=details, finished_at=at)

    @property
    def active(self) -> list[int]:
        return [run.number for run in self.known if run.status != "finished"]


@dataclass
class World:
    """A coordinator's folder with its conductor and a SuperLink."""

    folder: CoordinatorFolder
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.link = Link(self.clock)
        self.store = StudyStore(self.folder, self.clock)
        self.restart()

    def restart(self) -> None:
        """What a coordinator that is started again has of the one before: the folder."""
        self.conductor = Conductor(StudyStore(self.folder), self.clock, self.clock.seconds)

    def submit(self, name: str = "study") -> StoredStudy:
        plan = plan_of(name)
        found = self.store.submit(plan, SITES, machine_of(self.folder.study(plan)))
        self.clock.later(1)
        return found

    def tick(self, times: int = 1) -> None:
        """Let seconds pass, each with a tick."""
        for _ in range(times):
            self.conductor.tick(self.link)
            self.clock.later(1)

    def state(self, study: StoredStudy) -> str:
        return self.conductor.decisions[study.path].state

    def begun(self) -> int:
        """Tick until a run is active, and let it begin."""
        self.tick()
        (run,) = self.link.active
        self.link.begin(run)
        return run


SITES = ("a", "b", "c", "d", "e", "f")


def plan_of(name: str = "study") -> StudyPlan:
    return StudyPlan.from_json(plan_text(name=name))


def machine_of(place: Path) -> Machine:
    return Machine(run_dir=str(place), model_folder=str(place / "model"))


def keep_round(folder: Path, number: int) -> None:
    """Leave a checkpoint of a round, by its name alone."""
    (folder / "checkpoints" / f"round-{number:06d}.safetensors").write_bytes(b"")


MakeWorld = Callable[[], World]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(CoordinatorFolder(tmp_path / "coordinator"))
