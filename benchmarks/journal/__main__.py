"""`python -m benchmarks.journal`: what charging to a journal costs, and what checking one does."""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks.journal import charging, reading, report
from benchmarks.simulation.machine import machine


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print Markdown or one line of JSON."""
    options = _parser().parse_args(arguments)
    facts = {name: value for name, value in machine().items() if name not in {"flwr", "ray", "torch"}}
    facts |= {name: version(name) for name in ("cryptography", "rfc8785", "pydantic")}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = {
            "machine": facts,
            "charges": charging.measured(Path(folder), options.turns, options.batch),
            "composed_s": charging.composing(Path(folder), options.turns),
            "reading": reading.measured(Path(folder), options.records),
        }
    print(json.dumps(result) if options.format == "json" else report.render(result), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.journal", description=__doc__)
    parser.add_argument("--records", type=int, default=20_000, help="records of the journal that is checked")
    parser.add_argument("--turns", type=int, default=15, help="measured turns of each peer")
    parser.add_argument("--batch", type=int, default=100, help="operations a turn")
    parser.add_argument("--folder", type=Path, help="where to write; the disk that is there is what is measured")
    parser.add_argument("--format", choices=["markdown", "json"], default="markdown")
    return parser


if __name__ == "__main__":
    main()
