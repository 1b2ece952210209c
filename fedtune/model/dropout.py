"""LoRA's dropout with masks from the site's own random source instead of torch's global generator.

A record's mask depends on its place in the batch, and that place on which other records were drawn. Masks known to an
outsider would therefore couple the records: one more record shifts all others' masks, and the clipped sum moves by far
more than the clip norm. Drawn from the stream that also draws the noise, masks are as secret as the noise is.

A source never rewinds, so a layer that runs a second time for its gradient (see `checkpointing`) is given the masks of
the first time again: fresh ones would be the gradient of another function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedtune.privacy.random import RandomSource

Kept = NDArray[np.bool_] | None  # which numbers stay, flat; None where dropout sleeps
Draw = Callable[[], Kept]


class SourcedDropout(nn.Module):
    """Zeroes each number with probability p and scales the rest by 1 / (1 - p), while it has a `source`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.source: RandomSource | None = None
        self.tape: Callable[[Draw], Kept] | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Return the values (records, …), dropped independently of each other."""

        def draw() -> Kept:
            return None if self.source is None else np.asarray(self.source.uniform(values.numel()) >= self.p)

        kept = draw() if self.tape is None else self.tape(draw)
        if kept is None:
            return values
        mask = torch.from_numpy(kept).view(values.shape).to(values.device)
        return values * mask / (1.0 - self.p)


class MaskMemory:
    """The masks of one call of a layer: a block that keeps what is drawn, or one that gives it again in order.

    Masks wait in the memory of the CPU, a bit a number. A repeating block may be entered many times, in another thread
    and after the source is gone; it draws nothing.
    """

    def __init__(self, layers: Sequence[SourcedDropout]) -> None:
        self._layers = layers
        self._kept: list[tuple[NDArray[np.uint8], int] | None] = []

    def keeping(self) -> MaskBlock:
        """Return the block for the forward pass."""
        return MaskBlock(self._layers, lambda: self._keep)

    def repeating(self) -> MaskBlock:
        """Return the block for a recomputation."""
        return MaskBlock(self._layers, self._from_the_start)

    def _keep(self, draw: Draw) -> Kept:
        mask = draw()
        self._kept.append(None if mask is None else (np.packbits(mask), mask.size))
        return mask

    def _from_the_start(self) -> Callable[[Draw], Kept]:
        masks = iter(self._kept)
        return lambda _draw: _unpacked(next(masks))


class MaskBlock:
    """A block in which the masks of some layers go through a tape; it can be entered again."""

    def __init__(self, layers: Sequence[SourcedDropout], make_tape: Callable[[], Callable[[Draw], Kept]]) -> None:
        self._layers, self._make_tape = layers, make_tape

    def __enter__(self) -> None:
        tape = self._make_tape()
        for layer in self._layers:
            layer.tape = tape

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers:
            layer.tape = None


def _unpacked(kept: tuple[NDArray[np.uint8], int] | None) -> Kept:
    return None if kept is None else np.unpackbits(kept[0], count=kept[1]).astype(np.bool_)


def replace_dropout(adapted: nn.Module) -> None:
    """Put sourced dropout in the place of PEFT's; without dropout PEFT has an identity there, which stays."""
    for name, holder in adapted.named_modules():
        if name.endswith("lora_dropout") and isinstance(holder, nn.ModuleDict):
            for key, layer in holder.items():
                if isinstance(layer, nn.Dropout):
                    holder[key] = SourcedDropout(layer.p)
