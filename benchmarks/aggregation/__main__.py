"""`python -m benchmarks.aggregation SUBCOMMAND`: measurements of the aggregation rules; `SUBCOMMAND --help` for each.

A subcommand is a module of this package with `main(arguments)`, imported only when it is asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Final

SUBCOMMANDS: Final = {
    "kernels": "speed of the mean, seconds of one layer by every rule, peak memory of collecting",
    "comparison": "every algorithm on one small study of BANKING77, and accuracy by bytes; resumable",
    "attacks": "accuracy under five attacks, every robust rule, up to 40 % attackers",
}


def main(arguments: list[str] | None = None) -> None:
    """Hand the arguments to the subcommand, or list those there are."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] not in SUBCOMMANDS:
        told = [f"  {name:12} {about}" for name, about in SUBCOMMANDS.items()]
        print("usage: python -m benchmarks.aggregation SUBCOMMAND [OPTIONS]", *told, sep="\n")
        sys.exit(0 if words[:1] in (["-h"], ["--help"]) else 2)
    import_module(f"benchmarks.aggregation.{words[0]}").main(words[1:])


if __name__ == "__main__":
    main()
