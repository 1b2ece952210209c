"""The two measurements: an adapter to all sites and back, and what a round takes beside its training.

Every measurement has a federation of its own, and the peers take turns, starting with another one each time. What a
peer cannot do is a result as well: its reason takes the place of its figures.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.deployment.federations import PARTS, Federation, Fedtune, Stock
from benchmarks.deployment.peaks import Peaks

PEERS: dict[str, Callable[[Path], Federation]] = {
    "fedtune": Fedtune,
    "flower": lambda folder: Stock(folder, database=False),
    "flower --database": lambda folder: Stock(folder, database=True),
}
SHOWN = (*PARTS, "disk")
Round = dict[str, float]


def transfer(
    peers: Sequence[str], sizes: Sequence[int], sites: int, repeats: int, patience: float
) -> list[dict[str, Any]]:
    """Return, by size in MiB and peer, medians of seconds down and up, of peak memory and of the state on disk."""
    rows = []
    for size in sizes:
        rounds = [{"mebibytes": size, "sleep": 0.0}]
        found = _turns(peers, repeats, lambda peer, rounds=rounds: once(peer, sites, rounds, patience))
        rows += [{"mebibytes": size, "peer": peer} | _medians(runs, _last) for peer, runs in found.items()]
    return rows


def overhead(
    peers: Sequence[str], sites: Sequence[int], rounds: int, seconds: float, repeats: int, patience: float
) -> list[dict[str, Any]]:
    """Return, by number of sites and peer, the median of a round's seconds beyond its training; the first warms up."""
    rows, asked = [], [{"mebibytes": 1, "sleep": seconds}] * (rounds + 1)

    def beyond(measured: list[Round]) -> Round:
        return {"seconds": statistics.median(one["seconds"] for one in measured[1:]) - seconds}

    for count in sites:
        found = _turns(peers, repeats, lambda peer, count=count: once(peer, count, asked, patience))
        rows += [{"sites": count, "peer": peer} | _medians(runs, beyond) for peer, runs in found.items()]
    return rows


def once(peer: str, sites: int, rounds: list[dict[str, float]], patience: float) -> dict[str, Any]:
    """Run rounds once with a new federation; return what its coordinator measured, CPU seconds a round, and MiB."""
    with tempfile.TemporaryDirectory(prefix="fedtune-bench-") as scratch:
        federation, out = PEERS[peer](Path(scratch)), Path(scratch) / "out.json"
        try:
            federation.start(sites)
            with Peaks(federation.processes.names, federation.state_bytes) as peaks:
                federation.run({"sites": sites, "rounds": rounds, "out": str(out)}, patience)
                time.sleep(0.2)
            measured = json.loads(out.read_bytes())
        finally:
            federation.processes.close()
    found, names = peaks.mebibytes(), (*federation.parts, "disk")
    largest = {part: found.get(name, 0.0) for part, name in zip(SHOWN, names, strict=True)}
    return {"rounds": measured, "cpu": peaks.cpu_seconds() / len(rounds), "peaks": largest}


def _turns(peers: Sequence[str], repeats: int, measure: Callable[[str], dict[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {peer: [] for peer in peers}
    for turn in range(repeats):
        for peer in [*peers[turn % len(peers) :], *peers[: turn % len(peers)]]:
            began = time.monotonic()
            try:
                found[peer].append(measure(peer))
            except (RuntimeError, TimeoutError) as error:
                found[peer].append(str(error).splitlines()[0])
            took = time.monotonic() - began
            print(f"{took:.0f} s: {peer}: {json.dumps(found[peer][-1])}", file=sys.stderr, flush=True)
    return found


def _medians(runs: list[Any], of: Callable[[list[Round]], Round]) -> dict[str, Any]:
    good = [run for run in runs if not isinstance(run, str)]
    failed = [run for run in runs if isinstance(run, str)]
    if not good:
        return {"failed": failed}
    times, peaks = [of(run["rounds"]) for run in good], [run["peaks"] for run in good]
    medians = {name: statistics.median(one[name] for one in times) for name in times[0]}
    medians["cpu"] = statistics.median(run["cpu"] for run in good)
    largest = {name: statistics.median(one[name] for one in peaks) for name in peaks[0]}
    return {**medians, "peaks": largest} | ({"failed": failed} if failed else {})


def _last(measured: list[Round]) -> Round:
    return {name: measured[-1][name] for name in ("down", "up", "seconds")}
