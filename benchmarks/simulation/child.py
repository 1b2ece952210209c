"""One measurement in this process: `python -m benchmarks.simulation.child KIND JSON` prints one JSON line.

A process of its own gives each measurement its own imports, caches and peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

_started = time.perf_counter()


def trivial(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a study of sites that train nothing, and return the seconds of each round after the first."""
    from benchmarks.simulation.echo import app as client
    from benchmarks.simulation.rounds import RoundClock
    from benchmarks.simulation.studies import trivial_study
    from fedtune.config import machine as machine_facts
    from fedtune.config.plan import PLAN_KEY
    from fedtune.flower.engine import run
    from fedtune.run.folder import create
    from fedtune.simulation.observer import watched_by
    from fedtune_server.app import app as server

    plan, machine = trivial_study(folder, settings["sites"], settings["rounds"] + 1, settings["backend"])
    machine_facts.announce(create(plan, machine).machine_file)
    clock = RoundClock(settings["sites"])
    with watched_by(clock):
        run(settings["backend"], server, client, settings["sites"], {PLAN_KEY: plan.json_text}, workers=2)
    return clock.parts(_started) | {"rounds": clock.seconds[1:]}


def fedtune(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the real study as `fedtune simulate` does, from its overrides to its summary."""
    import fedtune_client.app as client
    from benchmarks.simulation.rounds import RoundClock
    from benchmarks.simulation.studies import REAL_SITES, real_study
    from fedtune.simulation.runner import simulate

    found = real_study(folder, settings)
    resolved = time.process_time()
    clock = RoundClock(REAL_SITES)
    vars(client)["train_round"] = clock.timed(vars(client)["train_round"])
    simulate(found.plan, found.machine, clock)
    return clock.parts(_started) | {"cpu_to_plan": resolved}


def loop(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train the same study's plan in a plain loop, and compare its adapter with the study's."""
    from benchmarks.simulation.plain import train_plainly

    run = Path(settings["run"])
    return train_plainly(run, folder, _started)


def prepare(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the real study's plan for the loop, which resolves nothing itself."""
    from benchmarks.simulation.studies import real_study
    from fedtune.run.folder import create

    found = real_study(folder, settings)
    return {"run": str(create(found.plan, found.machine).path)}


def compare(_folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the largest difference between the loop's adapter and the study's last checkpoint."""
    import numpy as np
    from safetensors.numpy import load_file

    study = load_file(max(Path(settings["fedtune"], "run", "checkpoints").glob("*.safetensors")))
    loop = load_file(Path(settings["loop"], "adapter.safetensors"))
    return {"difference": max(float(np.abs(loop[name] - study[f"adapter/{name}"]).max()) for name in loop)}


if __name__ == "__main__":
    kind, where, text = sys.argv[1:4]
    measure = {"trivial": trivial, "fedtune": fedtune, "loop": loop, "prepare": prepare, "compare": compare}[kind]
    print(json.dumps(measure(Path(where), json.loads(text))), flush=True)
