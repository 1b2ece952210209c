"""What a site keeps of its optimiser between rounds, for `training.optimizer_state=keep`.

One file a round, whole or absent; a round starts from the newest state of an earlier round, so that a round repeated
after a crash starts from where it started the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedtune.run.files import make_folder, write_whole

_KEPT = 3


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """The optimiser states of one site in one study, in a folder."""

    folder: Path

    def before(self, number: int) -> Mapping[str, NDArray[np.float32]]:
        """Return the state that round `number` starts from; empty when no earlier round left one."""
        earlier = [path for path in self._all() if _round_of(path) < number]
        return load(earlier[-1].read_bytes()) if earlier else {}

    def keep(self, number: int, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep the state that round `number` ended with."""
        if not state:
            return
        make_folder(self.folder)
        write_whole(self.folder / f"optimizer-{number:06d}.safetensors", save(dict(state)))
        for old in self._all()[:-_KEPT]:
            old.unlink()

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("optimizer-*.safetensors"))


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("optimizer-"))
