"""CPU seconds of adding one adapter to the mean, beside a memory copy of the same adapter, taking turns.

The peers are handed the same tensors and go through them one by one. The plain sum is what a coordinator does that
promises nothing about the order of replies: float64 += float32, without a weight.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.aggregation.kernels.adapters import layout_of, random_state
from fedtune.aggregation.mean import StreamingMean

SIDE, RANK = 4096, 16
REPLIES = 3  # as many different adapters, in turns, so that none is in a cache because it was there before
WEIGHT = 1 / 3


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Return GB/s of adapter read by each peer (medians), and the paired ratios to the copy with quartiles."""
    numbers = settings["kilobytes"] * 256
    layout = layout_of(layers=max(1, numbers // (2 * SIDE * RANK)), side=min(SIDE, numbers // (2 * RANK)), rank=RANK)
    states = [random_state(layout, seed) for seed in range(REPLIES)]
    copy = {name: np.empty_like(array) for name, array in states[0].items()}
    sums = {name: np.zeros(array.shape) for name, array in states[0].items()}
    mean = StreamingMean(layout)
    peers = {
        "copy": lambda state: [np.copyto(copy[name], array) for name, array in state.items()],
        "plain": lambda state: [np.add(sums[name], array, out=sums[name]) for name, array in state.items()],
        "mean": lambda state: mean.add(state, WEIGHT),
    }
    seconds = _taking_turns(peers, states, settings["turns"])
    size = 4 * layout.size
    rates = {f"{name}_gb_s": statistics.median(size / found / 1e9 for found in seconds[name]) for name in peers}
    ratios = {name: _quartiles(seconds["copy"], seconds[name]) for name in ("plain", "mean")}
    return {"mebibytes": size / 2**20} | rates | {"ratios": ratios}


def _taking_turns(
    peers: dict[str, Callable[[Any], object]], states: list[dict[str, Any]], turns: int
) -> dict[str, list[float]]:
    """Return each peer's seconds a state, a turn at a time, starting with another peer each turn; two turns warm up."""
    names, seconds = list(peers), {name: [] for name in peers}
    for turn in range(-2, turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            began = time.thread_time()
            for state in states:
                peers[name](state)
            if turn >= 0:
                seconds[name].append((time.thread_time() - began) / len(states))
    return seconds


def _quartiles(copy: list[float], other: list[float]) -> dict[str, float]:
    """Return the ratio of speeds to the copy's, paired by turn."""
    low, median, high = statistics.quantiles((a / b for a, b in zip(copy, other, strict=True)), n=4)
    return {"low": low, "median": median, "high": high}
