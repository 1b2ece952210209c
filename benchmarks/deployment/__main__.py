"""`python -m benchmarks.deployment`: large adapters and short rounds between machines, by fedtune and stock Flower."""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.deployment import measure, report
from benchmarks.simulation.machine import machine


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print Markdown or one line of JSON."""
    options = _parser().parse_args(arguments)
    parts = options.parts or ["transfer", "rounds"]
    if options.quick:
        options.mebibytes, options.sites, options.rounds, options.repeats, options.seconds = [1], [1], 1, 1, 0.1
        options.peers, options.transfer_sites = ["fedtune"], 1
    facts = {name: value for name, value in machine().items() if name not in {"ray", "torch"}}
    result: dict[str, Any] = {"machine": facts}
    if "transfer" in parts:
        result["transfer"] = measure.transfer(
            options.peers, options.mebibytes, options.transfer_sites, options.repeats, options.patience
        )
    if "rounds" in parts:
        result["rounds"] = measure.overhead(
            options.peers, options.sites, options.rounds, options.seconds, options.repeats, options.patience
        )
    print(json.dumps(result) if options.format == "json" else report.render(result), flush=True)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _peers(text: str) -> list[str]:
    peers = text.split(",")
    if unknown := set(peers) - set(measure.PEERS):
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(unknown)}; there are {', '.join(measure.PEERS)}")
    return peers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deployment", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="transfer|rounds", help="default: both")
    parser.add_argument("--mebibytes", type=_numbers, default=[10, 100, 500], help="sizes of the adapter: 10,100,500")
    parser.add_argument("--transfer-sites", type=int, default=2, help="sites that the adapter goes to")
    parser.add_argument("--sites", type=_numbers, default=[2, 4, 8], help="numbers of sites of the short rounds: 2,4,8")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a site sleeps in a round")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of everything")
    parser.add_argument("--peers", type=_peers, default=list(measure.PEERS), help=", ".join(measure.PEERS))
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which a run is given up")
    parser.add_argument("--quick", action="store_true", help="seconds: fedtune alone, one site, 1 MiB, one short round")
    parser.add_argument("--format", choices=["markdown", "json"], default="markdown")
    return parser


if __name__ == "__main__":
    main()
