"""One measurement in this process: `python -m benchmarks.aggregation.kernels.child KIND JSON` prints one JSON line."""

from __future__ import annotations

import json
import sys
from importlib import import_module

if __name__ == "__main__":
    kind, text = sys.argv[1:3]
    if kind not in {"mean", "layer", "memory"}:
        raise SystemExit(f"no measurement is called {kind}")
    module = import_module(f"benchmarks.aggregation.kernels.{kind}")
    print(json.dumps(module.measure(json.loads(text))), flush=True)
