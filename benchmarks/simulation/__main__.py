"""`python -m benchmarks.simulation`: what the simulation costs a site, and what it adds to a real job."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.simulation import report
from benchmarks.simulation.data import missing
from benchmarks.simulation.machine import machine
from benchmarks.simulation.processes import measured


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print tables, Markdown or JSON."""
    options = _parser().parse_args(arguments)
    options.parts = options.parts or ["trivial", "real"]
    if options.quick:
        options.sites, options.rounds, options.repeats, options.no_ray, options.parts = [20], 2, 1, True, ["trivial"]
    result: dict[str, Any] = {"machine": machine()}
    if "trivial" in options.parts:
        result["trivial"] = trivial(options)
    if "real" in options.parts:
        result["real"] = real(options)
    print(report.render(result, options.format), flush=True)


def trivial(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each number of sites on both backends, alternating; medians over all rounds of all repetitions."""
    skipped = "--no-ray" if options.no_ray else "" if find_spec("ray") else "Ray is not installed"
    backends = ["inprocess"] if skipped else ["inprocess", "ray"]
    rows = []
    for sites in options.sites:
        found: dict[str, list[dict[str, Any]]] = {backend: [] for backend in backends}
        for _ in range(options.repeats):
            for backend in backends:
                settings = {"sites": sites, "rounds": options.rounds, "backend": backend}
                found[backend].append(_told(measured("trivial", settings), f"{sites} sites, {backend}"))
        rows.append({"sites": sites} | {backend: _summary(runs, sites) for backend, runs in found.items()})
    return {"rows": rows, "ray_skipped": skipped}


def real(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the real study and the plain loop, alternating; the loop trains the plan that was resolved before."""
    if reason := missing():
        return {"skipped": reason}
    settings = {"rows": options.rows, "rounds": options.real_rounds, "threads": options.threads}
    found: dict[str, list[dict[str, Any]]] = {"loop": [], "fedtune": []}
    with tempfile.TemporaryDirectory(prefix="fedtune-bench-") as scratch:
        prepared = measured("prepare", settings, Path(scratch) / "plan")
        for repeat in range(options.repeats):
            for how in ("loop", "fedtune"):
                folder = Path(scratch) / f"{how}-{repeat}"
                asked = settings if how == "fedtune" else {"run": prepared["run"]}
                found[how].append(_told(measured(how, asked, folder), f"real job, {how}"))
        largest = measured(
            "compare", {"loop": str(Path(scratch) / "loop-0"), "fedtune": str(Path(scratch) / "fedtune-0")}
        )
    medians = {how: _medians(runs) for how, runs in found.items()}
    about = {"rows": options.rows, "rounds_of_study": options.real_rounds, "threads": options.threads}
    return about | medians | {"largest_difference": largest["difference"], "runs": found}


def _summary(runs: list[dict[str, Any]], sites: int) -> dict[str, float]:
    seconds = median(second for run in runs for second in run["rounds"])
    peak, startup = (median(run[key] for run in runs) for key in ("peak_mb", "startup"))
    return {"seconds": seconds, "ms_a_site": 1e3 * seconds / sites, "peak_mb": peak, "startup": startup}


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    for run in runs:
        run["rounds"] = sum(run["rounds"])
        run["beside"], run["cpu_beside"] = run["rounds"] - run["training"], run["cpu_rounds"] - run["cpu_training"]
    return {key: median(run[key] for run in runs) for key in runs[0]}


def _told(result: dict[str, Any], what: str) -> dict[str, Any]:
    print(f"{what}: {result['wall']:.1f} s", file=sys.stderr, flush=True)
    return result


def _sizes(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="trivial|real", help="default: both")
    parser.add_argument("--sites", type=_sizes, default=[10, 100, 1000], help="numbers of trivial sites: 10,100,1000")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of the trivial study")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of everything")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the real study")
    parser.add_argument("--real-rounds", type=int, default=2, help="rounds of the real study")
    parser.add_argument("--threads", type=int, default=1, help="threads of the real study")
    parser.add_argument("--no-ray", action="store_true", help="leave Flower's Ray engine out")
    parser.add_argument("--quick", action="store_true", help="seconds: one small size, no Ray, no real study")
    parser.add_argument("--format", choices=["text", "markdown", "json"], default="text")
    parser.add_argument("--markdown", action="store_const", const="markdown", dest="format", help="--format markdown")
    return parser


if __name__ == "__main__":
    main()
