"""Starts one measurement in a fresh process and reads its JSON line; imports nothing heavy.

Linux lets a child's peak memory start at its parent's size, so the parent stays small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def measured(kind: str, settings: dict[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """Return what `benchmarks.dp_step.child` measured; its progress goes to our standard error unless `quiet`."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.dp_step.child", kind, json.dumps(settings)]
    errors = subprocess.PIPE if quiet else None
    done = subprocess.run(
        command, cwd=_ROOT, env=_environment(settings), stdout=subprocess.PIPE, stderr=errors, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])} failed:\n{(done.stderr or '')[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    packages = os.pathsep.join(str(_ROOT / name) for name in (".", "server", "client"))
    threads = str(settings.get("threads", 1))
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    return {**os.environ, **quiet, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": packages}
