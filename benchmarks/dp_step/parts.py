"""What each part of the benchmark measures, process by process; returns JSON values. Imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from benchmarks.dp_step.configurations import (
    LARGE,
    MEMORY_HEADLINE,
    TABLE,
    TIME_HEADLINE,
    Configuration,
    headline,
    quick,
    reshaped,
    selected,
)
from benchmarks.dp_step.costs import cost
from benchmarks.dp_step.processes import measured
from benchmarks.dp_step.report import NAMES
from benchmarks.dp_step.scaling import fitted_rate, points, predicted
from benchmarks.dp_step.studies import missing

BASELINE, OURS = "peft", "fedtune"
_LARGE_PEERS = ["peft", "fedtune", "fedtune_nonprivate", "opacus_hooks"]

Options = argparse.Namespace
Found = dict[str, Any]


def table(options: Options) -> Found:
    """Measure every selected configuration, and put the figures of the headline at the top."""
    shapes = selected(options.model, options.targets)
    if options.quick:
        shapes = [quick(shapes[0] if options.model or options.targets else TABLE[1])]
    rows = [_configuration(reshaped(shape, _sizes(options)), options) for shape in shapes]
    by_name = {row["name"]: row for row in rows}
    fast, small = headline(list(by_name), TIME_HEADLINE), headline(list(by_name), MEMORY_HEADLINE)
    summary = {key: by_name[fast][key] for key in ("ratio_to_peft_nonprivate", "ratio_to_fused_nonprivate", "spread")}
    summary |= {"memory_ratio": by_name[small]["memory_ratio"], "headline": {"time": fast, "memory": small}}
    return {"configurations": rows} | summary


def real(options: Options) -> Found:
    """Measure the peers on real batches, with adapters on q and v and on all linear layers."""
    if reason := missing(options.real):
        return {"data": options.real, "skipped": reason}
    rows = {"rows": 200, "rate": 0.1} if options.quick else {"rows": 2000, "rate": 0.08}
    rows |= {"physical_batch": options.batch or 32}
    found = {}
    for targets in [options.targets] if options.targets else ["qv", "all-linear"]:
        _tell(f"{options.real}, {targets}")
        found[targets] = measured("real", _common(options) | rows | {"data": options.real, "targets": targets})
    return {"data": options.real, "targets": found}


def scaling(options: Options) -> Found:
    """Measure time and memory of fedtune's step on every point, and fit the cost model's one number."""
    base = reshaped(quick(TABLE[1]) if options.quick else TABLE[1], _sizes(options))
    curves = points(base, quick=options.quick)
    shapes = {shape.name: shape for _, _, shape in curves}
    _tell(f"{len(shapes)} shapes around {base.words}")
    settings = _common(options) | {"peer": OURS}
    found = measured("scaling", settings | {"configurations": [shape.to_dict() for shape in shapes.values()]})
    memory = _memory({name: settings | {"configuration": shape.to_dict()} for name, shape in shapes.items()}, options)
    rate = fitted_rate([(shapes[name], milliseconds) for name, milliseconds in found["ms"].items()])
    rows = [
        {"varied": name, "value": value} | _point(shape, found["ms"], memory, rate) for name, value, shape in curves
    ]
    return {"base": base.words, "operations_per_s": rate, "rows": rows, "failed": found["failed"]}


def endtoend(options: Options) -> Found:
    """Measure records a second through the whole study, the sides taking turns."""
    if reason := missing("banking77"):
        return {"skipped": reason}
    rows, steps, repeats = (200, 1, 1) if options.quick else (options.rows, options.steps, 3)
    settings = _common(options) | {"targets": options.targets or "all-linear", "rows": rows, "steps": steps}
    settings |= {"physical_batch": options.batch or 32}
    sides = {
        "peft_loop": ("plain", {}),
        "fedtune_lora": ("simulated", {"engine": "lora"}),
        "fedtune_opacus": ("simulated", {"engine": "opacus"}),
    }
    runs: dict[str, list[Found]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side, (kind, extra) in sides.items():
            _tell(f"{side}, {repeat + 1} of {repeats}")
            runs[side].append(measured(kind, settings | extra, quiet=True))
    medians = {side: {key: median(run[key] for run in each) for key in each[0]} for side, each in runs.items()}
    return {"rows": rows, "steps": steps, "targets": settings["targets"], "sides": medians, "runs": runs}


def large(options: Options) -> Found:
    """Measure the 1B-class shape on a GPU; without one, say so."""
    name = measured("gpu", {})["name"]
    if not name:
        return {"skipped": "torch finds no CUDA device on this machine; the 1B-class shape is measured on a GPU only"}
    options.device, options.peers = "cuda", options.peers or _LARGE_PEERS
    shape = reshaped(quick(LARGE) if options.quick else LARGE, _sizes(options))
    row = _configuration(shape, options)
    found = cost(shape)
    for figures in row["time"].values():
        if "failed" not in figures:
            figures["tokens_per_s"] = 1e3 * shape.batch * shape.tokens / figures["ms"]
            figures["share_of_peak"] = 1e3 * found.operations / figures["ms"] / (1e12 * options.peak_tflops)
    return {"gpu": name, "peak_tflops": options.peak_tflops, "operations": found.operations} | row


def _configuration(shape: Configuration, options: Options) -> Found:
    """Measure all peers on one configuration: memory in a process each, time in one process."""
    _tell(shape.words)
    settings = _common(options) | {"configuration": shape.to_dict()}
    found = measured("timing", settings)
    few = [BASELINE, OURS] if options.quick else settings["peers"]
    memory = _with_ratios(_memory({peer: settings | {"peer": peer} for peer in few}, options))
    ours, fused = found["peers"][OURS], found["to_fused_nonprivate"]
    return {
        "name": shape.name,
        "words": shape.words,
        "configuration": shape.to_dict(),
        "time": found["peers"],
        "memory": memory,
        "ratio_to_peft_nonprivate": ours.get("ratio"),
        "ratio_to_fused_nonprivate": fused and fused["ratio"],
        "memory_ratio": memory.get(OURS, {}).get("ratio"),
        "spread": {"peft": _spread(ours), "fused": _spread(fused or {})},
    }


def _memory(each: dict[str, Found], options: Options) -> dict[str, Found]:
    """Measure each in a process of its own; on a CPU two at a time, which does not change what one of them uses."""
    if options.no_memory:
        return {}
    with ThreadPoolExecutor(2 if options.device == "cpu" else 1) as pool:
        found = pool.map(lambda settings: measured("memory", settings, quiet=True), each.values())
        return dict(zip(each, found, strict=True))


def _with_ratios(memory: Found) -> Found:
    """Return peaks with their ratio to plain PEFT's, of the whole process and above the imports."""
    base = memory.get(BASELINE, {})
    found = {}
    for peer, peaks in memory.items():
        ratios = {}
        if "peak_mb" in peaks and "peak_mb" in base:
            ratios["ratio"] = peaks["peak_mb"] / base["peak_mb"]
            ratios["ratio_above_imports"] = peaks["above_imports_mb"] / base["above_imports_mb"]
        found[peer] = peaks | ratios
    return found


def _point(shape: Configuration, times: Found, memory: Found, rate: float) -> Found:
    expected = cost(shape)
    return {
        "words": shape.words,
        "ms": times.get(shape.name),
        "predicted_ms": predicted(shape, rate),
        "operations": expected.operations,
        "extra_operations": expected.extra_operations,
        "store_mb": expected.store_bytes / 1e6,
        "parameters": expected.parameters,
        "memory": memory.get(shape.name),
    }


def _common(options: Options) -> Found:
    turns, warmup = (2, 1) if options.quick else (options.turns, options.warmup)
    peers: Sequence[str] = options.peers or list(NAMES)
    kept = [*dict.fromkeys([BASELINE, OURS, *peers])]
    names = ("device", "threads", "noise")
    return {"turns": turns, "warmup": warmup, "peers": kept} | {name: getattr(options, name) for name in names}


def _sizes(options: Options) -> dict[str, int | None]:
    return {"batch": options.batch, "tokens": options.tokens, "rank": options.rank}


def _spread(figures: Found) -> list[float] | None:
    """Return the quartiles of the paired ratios."""
    return [figures["ratio_low"], figures["ratio_high"]] if "ratio" in figures else None


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
