"""Starts one measurement in a fresh process, on one thread, and reads its JSON line; imports nothing heavy.

Linux lets a child's peak memory start at its parent's size, so the parent stays small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[3]
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def measured(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what `benchmarks.aggregation.kernels.child` measured."""
    command = [sys.executable, "-m", "benchmarks.aggregation.kernels.child", kind, json.dumps(settings)]
    packages = os.pathsep.join(str(_ROOT / name) for name in (".", "server", "client"))
    environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": packages}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
