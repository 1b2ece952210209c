"""The command: every run that has no line yet, then the tables; imports nothing heavy before it runs one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from benchmarks.aggregation.comparison import report
from benchmarks.aggregation.comparison.runs import (
    FAMILIES,
    LEARNING_RATES,
    PARTITIONS,
    PRIVACY,
    SEEDS,
    Run,
    Upload,
    runs,
)
from benchmarks.simulation.data import missing

PARTS: Final = ("algorithms", "bytes")
QUICK: Final = ("data.limit=2000", "federation.rounds=2", "evaluation.every=2", "training.sampling_rate=0.1")
_QUICK_ALGORITHMS: Final = ("fedit", "fedsa", "fedask")


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and print the tables as Markdown or all lines as JSON."""
    options = _parser().parse_args(arguments)
    if lacking := missing():
        sys.exit(lacking)
    changes = (*(QUICK if options.quick else ()), *options.overrides)
    asked = _asked(options)
    results = options.out / "results.jsonl"
    if not options.report:
        _run(asked, changes, options, results)
    _print(asked, changes, results, options.format)


def _asked(options: argparse.Namespace) -> list[Run]:
    if not options.quick:
        return [run for run in runs(options.part or PARTS, options.seeds) if _wanted(run, options)]
    small = [Run(name, "dirichlet", privacy, 0) for privacy in ("off", "dp") for name in _QUICK_ALGORITHMS]
    return [*small, Run("fedit", "dirichlet", "off", 0, Upload("int4"))]


def _wanted(run: Run, options: argparse.Namespace) -> bool:
    chosen = {"algorithm": run.algorithm, "partition": run.partition, "privacy": run.privacy}
    return all(getattr(options, name) is None or value in getattr(options, name) for name, value in chosen.items())


def _run(asked: list[Run], changes: tuple[str, ...], options: argparse.Namespace, results: Path) -> None:
    from benchmarks.aggregation.comparison.material import prepared
    from benchmarks.aggregation.comparison.running import run_all
    from fedtune.commands.screen import quiet_libraries
    from fedtune.run.files import cut_torn_line

    quiet_libraries(verbose=False)
    options.out.mkdir(parents=True, exist_ok=True)
    material = prepared(options.out)
    share, of = options.share
    if results.exists() and share == 0:
        cut_torn_line(results)
    run_all(asked[share::of], material, changes, results)


def _print(asked: list[Run], changes: tuple[str, ...], results: Path, form: str) -> None:
    from benchmarks.aggregation.comparison.running import finished, key_of

    known = finished(results)
    lines = {run: known[key_of(run, changes)] for run in asked if key_of(run, changes) in known}
    if form == "json":
        print(json.dumps(list(lines.values())), flush=True)
    else:
        print(report.render(lines, len(asked)), flush=True)


def _share(text: str) -> tuple[int, int]:
    number, of = (int(word) for word in text.split("/"))
    if not 0 < number <= of:
        raise argparse.ArgumentTypeError(f"{text}: of 1/2 and 2/2, each process does one")
    return number - 1, of


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    rates = ", ".join(f"{family} {rate:g}" for family, rate in LEARNING_RATES.items())
    about = f"Needs FEDTUNE_DATA and the extra `demo`. Learning rates: {rates}."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation comparison", description=about)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of every run, such as federation.rounds=20")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: both")
    parser.add_argument("--seeds", type=_counts, default=list(SEEDS), help="0,1,2: these seeds alone")
    parser.add_argument("--algorithm", action="append", choices=FAMILIES, help="default: all")
    parser.add_argument("--partition", action="append", choices=PARTITIONS, help="default: both")
    parser.add_argument("--privacy", action="append", choices=PRIVACY, help="default: both")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/comparison"), help="folder of results.jsonl and material"
    )
    parser.add_argument("--share", type=_share, default=(0, 1), help="1/2 and 2/2: two processes that share the runs")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--quick", action="store_true", help="a minute: few runs of two small rounds")
    parser.add_argument("--format", choices=["markdown", "json"], default="markdown")
    return parser
