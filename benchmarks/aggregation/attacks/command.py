"""The command: one study after the other in this process, a JSON line for each that is finished, then the tables.

A study whose line is there is not run again, so an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.aggregation.attacks import report
from benchmarks.aggregation.attacks.cells import Cell, against, table, without_attack
from benchmarks.simulation.data import banking77, missing
from benchmarks.simulation.machine import machine

Line = dict[str, Any]
RESULTS = "runs.jsonl"


def main(arguments: list[str] | None = None) -> None:
    """Run what is not finished yet, and print all tables as Markdown."""
    options = _parser().parse_args(arguments)
    if not options.quick and not options.report and (reason := missing()):
        raise SystemExit(reason)
    cells = _quick_cells() if options.quick else [cell for seed in range(options.seeds) for cell in table(seed)]
    done = finished(options.out / RESULTS)
    if not options.report:
        _run([cell for cell in cells if not cell.refusal and cell.key not in done], options)
        done = finished(options.out / RESULTS)
    print(", ".join(f"{name} {value}" for name, value in machine().items() if name != "ray"))
    print(report.render(cells, done), flush=True)


def finished(path: Path) -> dict[str, Line]:
    """Return the finished studies of a file by their cell's key; a torn last line is none."""
    if not path.is_file():
        return {}
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return {line["key"]: line for line in map(json.loads, whole)}


def _run(cells: list[Cell], options: argparse.Namespace) -> None:
    """Run studies, and write each one's line when it is finished."""
    if not cells:
        return
    from benchmarks.aggregation.attacks.records import write_files
    from benchmarks.aggregation.attacks.study import measured, quick_files, quick_settings
    from fedtune.commands.screen import quiet_libraries

    quiet_libraries(verbose=False)
    folder = options.out / "records"
    files = quick_files(folder) if options.quick else write_files(banking77(), folder, train=10, test=7)
    words = quick_settings(folder) if options.quick else []
    _mend(options.out / RESULTS)
    began = time.monotonic()
    for number, cell in enumerate(cells, start=1):
        line = {"key": cell.key, **measured(cell, files, *words)}
        with (options.out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        left = (time.monotonic() - began) / number * (len(cells) - number)
        print(f"[{number}/{len(cells)}] {json.dumps(line)}, {left / 60:.0f} min left", file=sys.stderr, flush=True)


def _mend(path: Path) -> None:
    """End a line that was torn, so that the next one is whole."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        path.write_bytes(b"".join(kept))


def _quick_cells() -> list[Cell]:
    rules = ("none", "median", "krum")
    return [*without_attack("ffa", rules), *against("ffa", rules, [4]), Cell("flexlora", "krum", "scaled", 2, 2)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation attacks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/attacks"), help="folder of the finished studies")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other draws; each as many studies again")
    parser.add_argument("--report", action="store_true", help="run nothing, print the tables of what is finished")
    parser.add_argument("--quick", action="store_true", help="seconds: a tiny random model and few studies")
    return parser
