"""The command: every measurement in fresh processes, one after the other; imports nothing heavy."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.aggregation.kernels import report
from benchmarks.aggregation.kernels.processes import measured
from benchmarks.simulation.machine import machine

LINEAR = ["fedit", "ffa", "rolora", "fedsvd", "fedsa", "fedsb", "fedask"]
STACKED = ["flora", "fedex", "flexlora", "hetlora"]
PARTS = ["mean", "layer", "memory"]


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print Markdown or one line of JSON."""
    options = _parser().parse_args(arguments)
    if options.quick:
        _shrink(options)
    facts = {name: value for name, value in machine().items() if name not in {"flwr", "ray", "torch"}}
    result: dict[str, Any] = {"machine": facts}
    for part in options.parts or PARTS:
        result[part] = {"mean": mean, "layer": layer, "memory": memory}[part](options)
    print(json.dumps(result) if options.format == "json" else report.render(result), flush=True)


def mean(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the streaming mean beside a memory copy and a plain sum, by size of the adapter."""
    sizes = [{"kilobytes": round(1024 * size), "turns": options.turns} for size in options.mebibytes]
    return [_told("mean", settings) for settings in sizes]


def layer(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the coordinator's seconds of one layer by every rule, and a dense SVD of the mean product."""
    names = ("side", "rank", "sites", "repeats")
    return _told("layer", {name: getattr(options, name) for name in names} | {"algorithms": [*LINEAR, *STACKED]})


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak of collecting, each rule and number of sites in a process of its own."""
    asked = [(name, None) for name in options.linear]
    asked += [(name, bound) for name in options.stacked for bound in (None, options.most_mebibytes)]
    rows = []
    for name, bound in asked:
        settings = {"algorithm": name, "side": options.memory_side, "rank": 16, "most_mebibytes": bound}
        found = {str(sites): _told("memory", settings | {"sites": sites}) for sites in options.cohorts}
        rows.append({"algorithm": name, "most_mebibytes": bound, "by_sites": found})
    return {"rows": rows}


def _told(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    result = measured(kind, settings)
    print(f"{kind} {json.dumps(settings)}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def _shrink(options: argparse.Namespace) -> None:
    options.mebibytes, options.turns = [0.1], 3
    options.side, options.rank, options.sites, options.repeats = 96, 4, 3, 1
    options.linear, options.stacked = ["fedit"], ["flexlora"]
    options.cohorts, options.memory_side, options.most_mebibytes = [6], 512, 0


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation kernels", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="mean|layer|memory", help="default: all", choices=[[], *PARTS])
    parser.add_argument("--mebibytes", type=_numbers, default=[1, 25, 100], help="sizes of the adapter: 1,25,100")
    parser.add_argument("--turns", type=int, default=21, help="measured turns of each peer of the mean")
    parser.add_argument("--side", type=int, default=4096, help="d_in and d_out of the layer")
    parser.add_argument("--rank", type=int, default=16, help="its rank")
    parser.add_argument("--sites", type=int, default=10, help="sites whose factors of the layer are aggregated")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each rule; the dense SVD runs once")
    parser.add_argument("--cohorts", type=_counts, default=[10, 100, 1000], help="numbers of sites: 10,100,1000")
    parser.add_argument("--linear", type=_names, default=LINEAR, help="linear rules whose memory is measured")
    parser.add_argument("--stacked", type=_names, default=STACKED, help="stacked rules whose memory is measured")
    parser.add_argument("--memory-side", type=int, default=4096, help="d_in and d_out of the two layers of an adapter")
    parser.add_argument("--most-mebibytes", type=int, default=64, help="bound above which the stack goes to disk")
    parser.add_argument("--quick", action="store_true", help="seconds: tiny sizes")
    parser.add_argument("--format", choices=["markdown", "json"], default="markdown")
    return parser
