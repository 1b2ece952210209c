"""The peak memory of one peer's steps in this process, which takes no other peer's.

On a CPU: the high-water mark of the whole process's resident set, and how far that is above the resident set after the
imports, which are the same for every peer. On a GPU: the most that was allocated there, the model included.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch

_MB = 1e6


def peak(prepare: Callable[[], Callable[[], None]], device: str, count: int = 3) -> dict[str, float]:
    """Return megabytes (10⁶ bytes) after `count` steps; `prepare` builds the model and its peer, and returns a step."""
    before = _resident()
    step = prepare()
    for _ in range(count):
        step()
    if device != "cpu":
        whole = torch.cuda.max_memory_allocated()
        return {"peak_mb": whole / _MB, "above_imports_mb": whole / _MB}
    whole = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mb": whole / _MB, "above_imports_mb": (whole - before) / _MB}


def _resident() -> int:
    """Return the resident set now, in bytes; the high-water mark so far where there is no /proc."""
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        return int(statistics.read_text().split()[1]) * resource.getpagesize()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
