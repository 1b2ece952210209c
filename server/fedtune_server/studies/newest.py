"""What a study's newest checkpoint says of it, read without its tensors. Knows no plan and judges nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_CHECKPOINTS = "checkpoints"
_LOOKS = 3
_MOST = 100_000_000  # bytes: a header that the format allows


def newest_round(folder: Path) -> int:
    """Return the last round that a study's folder keeps a checkpoint of, 0 before the first."""
    return max((_round(path) for path in _files(folder)), default=0)


def newest_facts(folder: Path) -> dict[str, Any]:
    """Return the running totals in the newest checkpoint (`StudyFacts.to_dict`), empty before the first.

    A checkpoint that is replaced meanwhile is looked for again; one that cannot be read says nothing here.
    """
    for _ in range(_LOOKS):
        files = sorted(_files(folder), key=_round)
        if not files:
            return {}
        try:
            return _facts(files[-1])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            return {}
    return {}


def _facts(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: its length in 8 bytes, then JSON whose metadata are texts."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, _MOST)))
    facts = json.loads(header["__metadata__"]["fedtune"])["facts"]
    if not isinstance(facts, dict):
        raise TypeError("the facts are no object")
    return facts


def _files(folder: Path) -> list[Path]:
    return [path for path in (folder / _CHECKPOINTS).glob("round-*.safetensors") if path.stem[6:].isdecimal()]


def _round(path: Path) -> int:
    return int(path.stem[6:])
