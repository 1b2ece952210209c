"""The peak of a coordinator's memory while it collects the replies of one exchange, in this process alone.

The peak is the high-water mark of the resident set, less the resident set before the first reply, when everything is
imported. A reply is made when it comes, and nobody but the collector keeps it.
"""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.aggregation.kernels.adapters import layout_of, random_state
from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.protocol import Turn
from fedtune.aggregation.lora.registry import get_algorithm

LAYERS = 2
_UNBOUNDED = 2**50


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Return mebibytes of peak, of one reply and on disk; `most_mebibytes` bounds the stack in memory."""
    algorithm, turn = get_algorithm(settings["algorithm"]), Turn(1)
    layout = layout_of(layers=LAYERS, side=settings["side"], rank=settings["rank"])
    bound = settings["most_mebibytes"]
    most = _UNBOUNDED if bound is None else bound * 2**20
    up = algorithm.up(layout, turn)
    random_state(up, 0)
    before = _resident()
    with tempfile.TemporaryDirectory(prefix="fedtune-bench-") as folder:
        averaged, stacked = algorithm.averaged(layout, turn), algorithm.stacked(layout, turn)
        collector = Collector(averaged, stacked, most_bytes=most, folder=Path(folder))
        for site in range(settings["sites"]):
            collector.add(f"{site:06d}", random_state(up, site), 1 / settings["sites"])
        gathered = collector.result()
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        spilled = getattr(gathered.stack, "spilled", 0)
        collector.close()
    found = {"peak": peak - before, "reply": 4 * up.size, "spilled": spilled}
    return {f"{name}_mib": value / 2**20 for name, value in found.items()}


def _resident() -> int:
    """Return the resident set now, in bytes; the high-water mark so far where there is no /proc."""
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        return int(statistics.read_text().split()[1]) * resource.getpagesize()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
