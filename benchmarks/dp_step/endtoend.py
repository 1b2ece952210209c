"""Records per second end to end: `fedtune simulate` with either engine, and plain PEFT in a loop without privacy.

All train MiniLM on the same rows of BANKING77, dealt to the same sites, in Poisson batches at the same rate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.dp_step.studies import SITES, study, targets_of

_RATE = 0.1


class _Meter:
    """Seconds and records of calls that train; the clocks start when it is made."""

    def __init__(self) -> None:
        self.records = 0
        self.inside = 0.0

    def around(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function, metered."""

        def metered(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            result = train(*arguments, **named)
            self.inside += time.process_time() - began
            self.records += result.records_seen
            return result

        return metered


def simulated(settings: dict[str, Any]) -> dict[str, Any]:
    """Run the study as `fedtune simulate` does, and return its records a second."""
    import fedtune_client.app as client
    from fedtune.simulation.progress import NullProgress
    from fedtune.simulation.runner import simulate

    meter = _Meter()
    vars(client)["train_round"] = meter.around(vars(client)["train_round"])
    with tempfile.TemporaryDirectory(prefix="fedtune-bench-") as scratch:
        overrides = [*_overrides(settings), f"privacy.engine={settings['engine']}"]
        found = study("banking77", overrides, Path(scratch) / "run")
        wall, cpu = time.perf_counter(), time.process_time()
        simulate(found.plan, found.machine, NullProgress())
        return _rates(meter.records, time.perf_counter() - wall, time.process_time() - cpu, meter.inside)


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Train the same sites' batches with plain PEFT in a loop, and return its records a second."""
    from benchmarks.dp_step.models import Subject
    from benchmarks.dp_step.peers import PlainPeft, Terms
    from benchmarks.dp_step.real import drawn
    from fedtune.privacy.random import SeededSource
    from fedtune.simulation.sites import dealt
    from fedtune.simulation.workspace import open_workspace

    found = study("banking77", _overrides(settings))
    wall, cpu, records, inside = time.perf_counter(), time.process_time(), 0, 0.0
    workspace = open_workspace(found.plan, found.machine)
    data = dealt(found.plan.json_text, found.machine, workspace.tokenizer)
    peer = PlainPeft(Subject(workspace.model, workspace.task.kind), Terms())
    for number in range(SITES):
        site, source = data.site(number), SeededSource("benchmark", "site", number)
        began = time.process_time()
        for batches, expected in drawn(found.plan, workspace, site.train, source, settings["steps"]):
            peer.step(batches, expected)
            records += sum(batch.records for batch in batches)
        inside += time.process_time() - began
    return _rates(records, time.perf_counter() - wall, time.process_time() - cpu, inside)


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [
        targets_of(settings["targets"]),
        f"data.limit={settings['rows']}",
        f"training.local_steps={settings['steps']}",
        f"training.sampling_rate={_RATE}",
        f"training.physical_batch={settings['physical_batch']}",
        f"run.threads={settings['threads']}",
        f"run.device={settings['device']}",
    ]


def _rates(records: int, wall: float, cpu: float, inside: float) -> dict[str, Any]:
    """Return records a second: of wall and CPU time after the plan, and of CPU time in the local training alone."""
    parts = {"records": records, "wall_s": wall, "cpu_s": cpu, "training_cpu_s": inside}
    rates = {"records_per_s": records / wall, "records_per_cpu_s": records / cpu}
    return parts | rates | {"records_per_training_cpu_s": records / inside}
