"""The coordinator's own work beside its processes: it waits for the SuperLink, and what goes wrong is told."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from fedtune.errors import TransportError
from fedtune.flower.local_gate import make_secret
from fedtune.processes.supervisor import ChildState
from fedtune_server.studies.conductor import Conductor
from fedtune_server.studies.registrar import Registrar
from fedtune_server.studies.steward import EXECUTOR, LINK, Steward
from tests.server.studies.conftest import World
from tests.support.enrolments import Coordinator


@pytest.fixture
def steward(world: World, coordinator: Coordinator) -> Iterator[Steward]:
    world.folder.path.mkdir(exist_ok=True)
    world.folder.run.mkdir()
    make_secret(world.folder.secret)
    made = Steward(world.folder, Conductor(world.store), Registrar(coordinator.enrolment))
    yield made
    made.close()


def states(link: str, pid: int | None = 1) -> list[ChildState]:
    return [
        ChildState(LINK, link, pid, 0, None, 0.0, None),  # type: ignore[arg-type]
        ChildState(EXECUTOR, "ready", 2, 0, None, 0.0, None),
    ]


def looked(steward: Steward, found: list[ChildState], seconds: float = 5.0) -> None:
    """Tick as a supervisor does for a while."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        steward.tick(found)
        time.sleep(0.01)


def test_nothing_is_done_while_the_superlink_is_not_ready(steward: Steward, world: World) -> None:
    world.submit()
    looked(steward, states("starting"), 0.3)
    assert dict(steward.studies) == {}


def test_a_superlink_that_does_not_answer_is_told_to_the_supervisor(steward: Steward, world: World) -> None:
    with pytest.raises(TransportError) as told:
        looked(steward, states("ready"))
    assert told.value.code == "transport.not-running"
    world.folder.link_ready.write_text('{"private": 9}')
    with pytest.raises(TransportError) as told:
        looked(steward, states("ready"))
    assert told.value.code == "transport.not-running"
