"""The stack of what sites sent, for rules that no mean can express: in memory up to a bound, then on disk.

Sites are walked in the order of their names, whatever the order of their replies, so that a study's result does not
depend on which site was quick. What is on disk is in one nameless temporary file of this user, which the operating
system removes with the process; it is not encrypted.

Knows no algorithm. Shapes may differ between sites (ranks); whether they may is `validation`'s business.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from fedtune.aggregation.lora.factors import Array, State
from fedtune.errors import AggregationError
from fedtune.run.files import disk_errors

MOST_BYTES: Final = 2**30


@dataclass(frozen=True, slots=True)
class _Spilled:
    """Where in the file one tensor lies."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class SpillingStack:
    """All sites' tensors with their weights, read back tensor by tensor.

    Memory: at most `most_bytes`, plus the one reply that is being added; reading takes K of one tensor. The replies
    that fit stay in memory, later ones go to a file under `folder` (the system's temporary folder when None).
    """

    __slots__ = ("_file", "_folder", "_held", "_most_bytes", "_replies", "_weights")

    def __init__(self, *, most_bytes: int = MOST_BYTES, folder: Path | None = None) -> None:
        self._most_bytes, self._folder = most_bytes, folder
        self._held = 0
        self._file: IO[bytes] | None = None
        self._weights: dict[str, float] = {}
        self._replies: dict[str, dict[str, Array | _Spilled]] = {}

    @property
    def shares(self) -> tuple[float, ...]:
        """Each site's pᵢ, in order of the sites' names: weights divided by their sum."""
        total = math.fsum(self._weights.values())
        return tuple(self._weights[site] / total for site in sorted(self._weights))

    @property
    def spilled(self) -> int:
        """Bytes on disk."""
        return 0 if self._file is None else self._file.seek(0, 2)

    def add(self, site: str, state: State, weight: float) -> None:
        """Add what one site sent; the arrays are kept, not copied.

        Errors: `bad-weight`, `duplicate-site`, and those of the disk. A reply that is refused leaves no trace.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise AggregationError("bad-weight", "a site's weight is not positive and finite")
        if site in self._weights:
            raise AggregationError("duplicate-site", f"site {site} is in this round's stack already")
        size = sum(array.nbytes for array in state.values())
        fits = self._held + size <= self._most_bytes
        self._replies[site] = dict(state) if fits else self._spill(state)
        self._held += size if fits else 0
        self._weights[site] = weight

    def tensors(self, name: str) -> list[Array]:
        """Return one tensor of every site, in order of the sites' names."""
        return [self._read(self._replies[site][name]) for site in sorted(self._replies)]

    def discard(self, site: str) -> None:
        """Forget what a site sent; its bytes on disk stay there until `close`."""
        del self._weights[site]
        self._held -= sum(held.nbytes for held in self._replies.pop(site).values() if isinstance(held, np.ndarray))

    def close(self) -> None:
        """Give the file back to the operating system; the stack is empty afterwards."""
        if self._file is not None:
            self._file.close()
        self._file, self._held = None, 0
        self._replies.clear()
        self._weights.clear()

    def _spill(self, state: State) -> dict[str, Array | _Spilled]:
        """Append a reply to the file; all of it counts only when all of it is written."""
        folder = Path(tempfile.gettempdir()) if self._folder is None else self._folder
        with disk_errors(folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the stack
            places: dict[str, Array | _Spilled] = {}
            for name, array in state.items():
                places[name] = _Spilled(self._file.seek(0, 2), array.shape, array.dtype)
                self._file.write(np.ascontiguousarray(array).tobytes())
            self._file.flush()
        return places

    def _read(self, held: Array | _Spilled) -> Array:
        if not isinstance(held, _Spilled):
            return held
        assert self._file is not None  # noqa: S101 - what is spilled is in the file
        self._file.seek(held.start)
        size = held.dtype.itemsize * math.prod(held.shape)
        return np.frombuffer(self._file.read(size), held.dtype).reshape(held.shape)
