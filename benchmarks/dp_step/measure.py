"""Times steps that take turns in one process, and pairs each with plain PEFT's in the same turn.

A slow second of the machine hits one turn of one peer; the medians of paired ratios forget it. On a CPU the clock is
the process's CPU time, which a busy machine disturbs least; on a GPU it is the wall clock between two idle moments.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.dp_step.peers import Peer
    from fedtune.data.batches import Batch

Step = Callable[[int], None]  # the turn's number tells which batch it is
Batches = Callable[[int], "tuple[Sequence[Batch], float]"]
BASELINE, OURS, FUSED = "peft", "fedtune", "fedtune_nonprivate"


@dataclass(frozen=True, slots=True)
class Turns:
    """Milliseconds of each peer's step in each turn, and why a peer has none."""

    milliseconds: Mapping[str, Sequence[float]]
    failed: Mapping[str, str]


def compare(peers: Mapping[str, Peer | str], batches: Batches, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return each peer's figures, and those of fedtune against its own non-private step, as JSON values."""
    alive = {name: peer for name, peer in peers.items() if not isinstance(peer, str)}
    steps = {name: _step(peer, batches) for name, peer in alive.items()}
    turns = take_turns(steps, settings["turns"], settings["warmup"], settings["device"])
    failed = {name: peer for name, peer in peers.items() if isinstance(peer, str)} | dict(turns.failed)
    if BASELINE in failed:
        raise RuntimeError(f"plain PEFT, which the others are compared with, failed: {failed[BASELINE]}")
    found: dict[str, Any] = {name: figures(turns, name, BASELINE) for name in turns.milliseconds}
    found |= {name: {"failed": error} for name, error in failed.items()}
    fused = figures(turns, OURS, FUSED) if {OURS, FUSED} <= set(turns.milliseconds) else None
    return {"peers": {name: found[name] for name in peers}, "to_fused_nonprivate": fused}


def take_turns(steps: Mapping[str, Step], turns: int, warmup: int, device: str) -> Turns:
    """Time every step once a turn, starting with another peer each turn; `warmup` turns before are not counted.

    A peer that fails in a turn is left out from there on, and its error is what the table says of it.
    """
    now, alive, failed = _clock(device), dict(steps), dict[str, str]()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + turns):
        for name in _rotated(list(alive), turn):
            seconds = _timed(alive[name], turn, now)
            if isinstance(seconds, str):
                failed[name] = seconds
                del alive[name], found[name]
            elif turn >= warmup:
                found[name].append(1e3 * seconds)
        _tell(turn + 1, warmup + turns)
    return Turns(found, failed)


def figures(turns: Turns, name: str, against: str) -> dict[str, Any]:
    """Return a peer's median milliseconds and the quartiles of its paired ratio to another."""
    own, other = turns.milliseconds[name], turns.milliseconds[against]
    ratios = [one / two for one, two in zip(own, other, strict=True)]
    low, high = _quartiles(ratios)
    spread = {"ratio_low": low, "ratio_high": high, "turns": len(ratios), "total_ms": sum(own)}
    return {"ms": median(own), "ratio": median(ratios)} | spread


def attempt(work: Callable[[], Any]) -> Any:
    """Return what the work returns, or its error as text: a peer that fails is a finding."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - peers fail in any way they like
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]:.160}"


def _step(peer: Peer, batches: Batches) -> Step:
    return lambda turn: peer.step(*batches(turn))


def _clock(device: str) -> Callable[[], float]:
    """Return a clock in seconds; on a GPU it waits until the GPU is idle."""
    if device == "cpu":
        return time.process_time

    def idle() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return idle


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def _rotated(names: list[str], turn: int) -> list[str]:
    at = turn % len(names)
    return names[at:] + names[:at]


def _timed(step: Step, turn: int, now: Callable[[], float]) -> float | str:
    gc.collect()  # hooks leave cycles behind; nobody pays for another's
    began = now()
    error = attempt(lambda: step(turn))
    return error if isinstance(error, str) else now() - began


def _tell(turn: int, of: int) -> None:
    print(f"\r  turn {turn} of {of}", end="" if turn < of else "\n", file=sys.stderr, flush=True)
