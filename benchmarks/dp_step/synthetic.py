"""Measurements on random models and batches; each function is run by a child process and returns JSON values."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.dp_step.configurations import Configuration
from benchmarks.dp_step.measure import Step, attempt, compare, take_turns
from benchmarks.dp_step.memory import peak
from benchmarks.dp_step.models import build, random_batch
from benchmarks.dp_step.peers import Terms
from benchmarks.dp_step.registry import PEERS, opened

Settings = dict[str, Any]


def timing(settings: Settings) -> dict[str, Any]:
    """Time all peers on one configuration, taking turns."""
    shape, device = Configuration(**settings["configuration"]), settings["device"]
    batch = random_batch(shape, device)
    peers = opened(build(shape, device), Terms(noise=settings["noise"]), settings["peers"])
    return compare(peers, lambda _turn: ([batch], batch.records), settings)


def memory(settings: Settings) -> dict[str, Any]:
    """Measure one peer's peak memory on one configuration."""
    shape = Configuration(**settings["configuration"])
    found = attempt(lambda: peak(_prepared(shape, settings), settings["device"]))
    return {"failed": found} if isinstance(found, str) else found


def scaling(settings: Settings) -> dict[str, Any]:
    """Time one peer on several configurations that take turns; milliseconds by configuration."""
    shapes = [Configuration(**values) for values in settings["configurations"]]
    steps = {shape.name: _counted(_prepared(shape, settings)()) for shape in shapes}
    turns = take_turns(steps, settings["turns"], settings["warmup"], settings["device"])
    times = {name: median(each) for name, each in turns.milliseconds.items()}
    return {"ms": times, "failed": dict(turns.failed)}


def _prepared(shape: Configuration, settings: Settings) -> Callable[[], Callable[[], None]]:
    """Return a function that builds the model and its peer, and returns the peer's step."""
    device, terms = settings["device"], Terms(noise=settings["noise"])

    def prepare() -> Callable[[], None]:
        one, batch = PEERS[settings["peer"]](build(shape, device), terms), random_batch(shape, device)
        return lambda: one.step([batch], batch.records)

    return prepare


def _counted(step: Callable[[], None]) -> Step:
    return lambda _turn: step()
