"""Disk, memory and what computes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fedtune.display import bytes_text
from fedtune.errors import ModelError
from fedtune_client.doctor.finding import Level, Subject, checked
from fedtune_client.machine import device_of, open_model

Said = Iterator[tuple[Level, str, str]]
_LITTLE, _TOO_LITTLE = 2e9, 1e8  # bytes: journal, vault and logs of many studies, and of none


@checked("disk")
def disk(subject: Subject) -> Said:
    """Whether journal and vault can grow: a site that cannot write refuses to train."""
    free = shutil.disk_usage(subject.folder.path).free
    level: Level = "fail" if free < _TOO_LITTLE else "warn" if free < _LITTLE else "ok"
    hint = "" if level == "ok" else "free some space: without any, the site refuses every round"
    yield level, f"{bytes_text(free)} are free where the site is", hint


@checked("device")
def device(subject: Subject) -> Said:
    """Tell what computes, and whether the largest base model fits into its memory."""
    found = device_of(subject.facts)
    threads = subject.facts.service.threads or os.cpu_count() or 1
    name, free = _gpu() if found == "cuda" else (f"CPU, {threads} threads", _memory())
    weights = max((_weights(subject, model) for model in subject.facts.models), default=0)
    needed = f"; the largest base model has {bytes_text(weights)} of weights" if weights else ""
    if free is None:
        yield "ok", f"{name}{needed}", ""
    elif free < weights:
        yield "warn", f"{name}, {bytes_text(free)} of memory free{needed}", "free some memory, or take a larger machine"
    else:
        yield "ok", f"{name}, {bytes_text(free)} of memory free{needed}", ""


def _gpu() -> tuple[str, int | None]:
    import torch

    return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]


def _memory() -> int | None:
    """Return the bytes that a new process can have without swapping, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _weights(subject: Subject, model: str) -> int:
    try:
        return sum(path.stat().st_size for path in open_model(subject.facts, model).folder.glob("*.safetensors"))
    except (ModelError, OSError):  # the check of models says it
        return 0
