"""What a site keeps of a study between rounds: its optimiser's moments, tensors of its own, and what it was sent.

One file or vault item a round, whole or absent. A round starts from what an earlier one left, so that a round repeated
after a crash starts from where it started the first time. Knows no algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.errors import MessageError
from fedtune.model.base import open_base
from fedtune.run.files import make_folder, write_whole
from fedtune.simulation.estimate import largest_rank
from fedtune_client.vault import Vault

Arrays = Mapping[str, NDArray[Any]]
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


@dataclass(frozen=True, slots=True)
class KeptTensors:
    """What never leaves the site as it is: a factor or a head of its own, variates, residuals; encrypted in the vault.

    Rounds that the coordinator has not counted leave nothing behind: the next one starts from the last that it has.
    """

    vault: Vault
    plan_sha256: str

    def after(self, counted: int) -> Arrays:
        """Return what the newest round up to `counted` has left; empty without one."""
        rounds = [number for number in self._rounds() if number <= counted]
        return load(self.vault.get(self._item(rounds[-1]))) if rounds else {}

    def at(self, number: int) -> Arrays:
        """Return what round `number` has left; empty where it left nothing."""
        return load(self.vault.get(self._item(number))) if number in self._rounds() else {}

    def keep(self, number: int, counted: int, tensors: Arrays) -> None:
        """Keep what round `number` leaves; of counted rounds and of others before it the newest few stay."""
        if not tensors:
            return
        self.vault.put(self._item(number), save({name: np.ascontiguousarray(array) for name, array in tensors.items()}))
        usable = [known for known in self._rounds() if known <= counted]
        waiting = [known for known in self._rounds() if counted < known < number]
        for old in usable[:-_KEPT] + waiting[:-_KEPT]:
            self.vault.remove(self._item(old))

    def _rounds(self) -> list[int]:
        return sorted(int(name.removeprefix(self._prefix)) for name in self.vault.names() if self._is_ours(name))

    def _is_ours(self, name: str) -> bool:
        return name.startswith(self._prefix)

    def _item(self, number: int) -> str:
        return f"{self._prefix}{number:06d}"

    @property
    def _prefix(self) -> str:
        return f"kept-{self.plan_sha256[:16]}-"


@dataclass(frozen=True, slots=True)
class ReceivedStates:
    """What a site was sent, by the coordinator's mark, so that later messages need only say what has changed."""

    folder: Path

    def get(self, mark: str) -> tuple[Arrays, Arrays]:
        """Return the adapter and the algorithm's memory kept under a mark; `message.lacks-state` without them.

        A file that cannot be read counts as none: the coordinator then sends everything.
        """
        path = self._path(mark)
        try:
            arrays = load(path.read_bytes())
        except (FileNotFoundError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise MessageError("lacks-state", "the message builds on a state that this site has not kept") from error
        path.touch()  # what messages still build on is not the oldest, however many rounds did not count since
        groups: dict[str, dict[str, NDArray[Any]]] = {"adapter": {}, "memory": {}}
        for key, array in arrays.items():
            group, _, name = key.partition("/")
            groups[group][name] = array
        return groups["adapter"], groups["memory"]

    def keep(self, mark: str, adapter: Arrays, memory: Arrays) -> None:
        """Keep a state under a mark; the newest few stay, this one among them whatever the clock says."""
        path = self._path(mark)
        if path.exists():
            path.touch()
            return
        make_folder(self.folder)
        groups = {"adapter": adapter, "memory": memory}
        arrays = {f"{group}/{name}": array for group, found in groups.items() for name, array in found.items()}
        write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
        others = [one for one in self.folder.glob("received-*.safetensors") if one != path]
        for old in sorted(others, key=lambda one: one.stat().st_mtime_ns)[: 1 - _KEPT]:
            old.unlink()

    def _path(self, mark: str) -> Path:
        return self.folder / f"received-{mark}.safetensors"


def most_rank(plan: StudyPlan, machine: Machine, folder: Path) -> int:
    """Return the largest rank that this machine's memory holds, the same for a study from its first question on."""
    path = folder / "rank"
    if not path.exists():
        make_folder(folder)
        write_whole(path, f"{largest_rank(plan, open_base(Path(machine.model_folder)))}\n".encode())
    return int(path.read_text(encoding="ascii"))


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("optimizer-"))
