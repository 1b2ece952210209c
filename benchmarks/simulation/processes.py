"""Runs one measurement in a fresh process and adds what the operating system says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def measured(kind: str, settings: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Return a child's measurements with its wall seconds, CPU seconds and peak resident megabytes.

    This process imports nothing heavy: Linux lets a child's peak start at its parent's size.
    """
    with tempfile.TemporaryDirectory(prefix="fedtune-bench-") as scratch:
        where = folder or Path(scratch)
        command = [sys.executable, "-m", "benchmarks.simulation.child", kind, str(where), json.dumps(settings)]
        errors = Path(scratch) / "stderr"
        began = time.perf_counter()
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                command, cwd=_ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=stderr, text=True
            ) as process,
        ):
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        if process.returncode:
            raise RuntimeError(f"{' '.join(command[2:])} failed:\n{errors.read_text()[-4000:]}")
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result | {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


def _environment() -> dict[str, str]:
    packages = os.pathsep.join(str(_ROOT / name) for name in (".", "server", "client"))
    quiet = {"HF_HUB_OFFLINE": "1", "RAY_DEDUP_LOGS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": packages}
