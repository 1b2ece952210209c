"""The coordinator's checkpoint: one file a round that holds everything a resumed study needs.

All randomness of a study is derived from the plan, the site and the round, so there is no generator state to keep.
The file is a safetensors file (no code, no pickle) whose metadata holds the round's facts as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedtune.aggregation.averaging import TailAverage
from fedtune.aggregation.lora.protocol import ServerState
from fedtune.errors import RunError
from fedtune.run.files import write_whole

_KEPT = 2
_PREFIXES = ("state", "average")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The coordinator's state after `round` rounds; `facts` are the running totals of the result."""

    round: int
    state: ServerState
    average: Mapping[str, NDArray[np.float32]]
    facts: Mapping[str, Any]


def save_checkpoint(folder: Path, plan_sha256: str, checkpoint: Checkpoint) -> None:
    """Write a round's checkpoint whole, then drop all but the newest two."""
    groups = checkpoint.state.to_arrays(), checkpoint.average
    arrays = {
        f"{prefix}/{name}": np.ascontiguousarray(array)
        for prefix, group in zip(_PREFIXES, groups, strict=True)
        for name, array in group.items()
    }
    about = {"plan_sha256": plan_sha256, "round": checkpoint.round, "facts": dict(checkpoint.facts)}
    write_whole(_path(folder, checkpoint.round), save(arrays, metadata={"fedtune": json.dumps(about, sort_keys=True)}))
    for old in _all(folder)[:-_KEPT]:
        old.unlink()


def latest_checkpoint(folder: Path, plan_sha256: str) -> Checkpoint | None:
    """Read the newest checkpoint of this plan, or None before the first round ended."""
    files = _all(folder)
    if not files:
        return None
    groups: dict[str, dict[str, NDArray[Any]]] = {prefix: {} for prefix in _PREFIXES}
    try:
        with safe_open(files[-1], framework="np") as file:
            about = json.loads(file.metadata()["fedtune"])
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                prefix, name = key.split("/", 1)
                groups[prefix][name] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        hint = f"remove {files[-1].name} to continue from the round before"
        raise RunError("damaged", f"{files[-1]} cannot be read as a checkpoint", hint=hint) from error
    if about["plan_sha256"] != plan_sha256:
        raise RunError("other-plan", f"{files[-1]} belongs to another plan", hint="resume without overrides")
    state = ServerState.from_arrays(groups["state"])
    return Checkpoint(about["round"], state, groups["average"], about["facts"])


def restore_average(average: TailAverage, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's averaging window."""
    average.load(checkpoint.average)


def _path(folder: Path, number: int) -> Path:
    return folder / f"round-{number:06d}.safetensors"


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*.safetensors"))
