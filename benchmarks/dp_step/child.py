"""One measurement in this process: `python -m benchmarks.dp_step.child KIND JSON` prints one JSON line.

A process of its own gives each measurement its own imports, caches and peak memory.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

_KINDS = {
    "timing": "synthetic",
    "memory": "synthetic",
    "scaling": "synthetic",
    "gpu": "gpu",
    "real": "real",
    "simulated": "endtoend",
    "plain": "endtoend",
}


def main(kind: str, settings: dict[str, Any]) -> None:
    """Measure and print; a kind is a function of its module."""
    import torch

    torch.set_num_threads(settings.get("threads", 1))
    measure = getattr(import_module(f"benchmarks.dp_step.{_KINDS[kind]}"), kind)
    print(json.dumps(measure(settings)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
