"""The flat store of per-record gradients: one row a record, one range of columns a parameter.

Layers add to it during the backward pass; clipping reads whole rows. Knows no layer, no loss and no clipping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor, nn

from fedtune.errors import PrivacyError


@dataclass(slots=True)
class _Columns:
    """Where one parameter stands; `tall` weights (d_out > d_in) are stored transposed, `written` in this pass.

    `slot` is the parameter's part of the buffer, as long as the number of records stays.
    """

    start: int
    shape: torch.Size
    stop: int
    tall: bool
    written: bool = False
    slot: Tensor | None = None


class GradientRows:
    """A (records, P) buffer in float32 (float64 for a float64 model), reused from one physical batch to the next.

    A tall weight, LoRA's B (d_out, r) above all, keeps its gradient as (r, d_out): the batched product HᵀG is up to
    twice as fast on a CPU as GᵀH. `arrange` undoes it for a sum, where it costs one pass over P numbers. The
    memory is `records`·P·4 bytes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        starts = accumulate((tensor.numel() for tensor in parameters), initial=0)
        pairs = zip(parameters, starts, strict=False)
        self._columns = {id(tensor): _columns(start, tensor.shape) for tensor, start in pairs}
        self.size = sum(tensor.numel() for tensor in parameters)
        self.dtype = reduce(torch.promote_types, (tensor.dtype for tensor in parameters), torch.float32)
        self._buffer = torch.empty(0, self.size, dtype=self.dtype, device=parameters[0].device)
        self.records, self._scale = 0, 1.0

    @contextmanager
    def recording(self, records: int, scale: float = 1.0) -> Iterator[None]:
        """Accept the gradients of so many records, times `scale`, inside the block; outside nothing is recorded."""
        if len(self._buffer) < records:
            self._enlarge(records)
        for columns in self._columns.values():
            columns.written = False
        self.records, self._scale = records, scale
        try:
            yield
        finally:
            self.records = 0

    def _enlarge(self, records: int) -> None:
        """Take memory for so many records, after the old is free."""
        for columns in self._columns.values():
            columns.slot = None
        self._buffer = self._buffer.new_empty(0, self.size)
        self._buffer = self._buffer.new_empty(records, self.size)

    def check(self, layer: str, inputs: Tensor) -> None:
        """Refuse inputs that are not one row a record.

        More rows are tokens, each of which would be clipped as a record; one row for all (the shared position
        embeddings of DeBERTa) has a gradient that belongs to no single record.
        """
        if len(inputs) != self.records:
            raise PrivacyError(
                "flattened-records",
                f"the layer {layer} sees {len(inputs)} rows for {self.records} records: it flattens tokens into the "
                "batch or is shared by the records, so there is no gradient for each record.",
                hint="Choose other lora.targets, or a base model whose layers keep the batch dimension.",
            )

    def finished(self) -> Tensor:
        """Return the rows (records, P) of this pass, valid until the next; what took no part is zero."""
        rows = self._buffer[: self.records]
        for columns in self._columns.values():
            if not columns.written:
                rows[:, columns.start : columns.stop].zero_()
        return rows

    def add_outer(self, parameter: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Add scale · left_bᵀ right_b to record b of a weight (m, n); left (B, T, m), right (B, T, n).

        Products of bfloat16 are accumulated and kept in float32.
        """
        columns, slot = self._slot(parameter)
        scale *= self._scale
        if columns.tall:
            left, right = right, left
        if left.is_cuda and left.dtype in {torch.bfloat16, torch.float16}:  # no float32 copy of the activations
            _put(columns, slot, torch.bmm(left.transpose(1, 2), right, out_dtype=torch.float32).mul_(scale))
        else:
            left, right = left.to(self.dtype).transpose(1, 2), right.to(self.dtype)
            torch.baddbmm(slot, left, right, beta=int(columns.written), alpha=scale, out=slot)
        columns.written = True

    def add(self, parameter: Tensor, values: Tensor) -> None:
        """Add gradients (B, *shape) that somebody else has formed."""
        columns, slot = self._slot(parameter)
        values = values if self._scale == 1 else values.to(self.dtype) * self._scale
        _put(columns, slot, values.transpose(1, 2) if columns.tall else values)
        columns.written = True

    @property
    def written(self) -> bool:
        """Say whether any layer has added to the rows of this pass."""
        return any(columns.written for columns in self._columns.values())

    def of(self, parameter: Tensor) -> Tensor:
        """Return one parameter's gradients (records, *shape) in its own layout, as a view of the rows."""
        columns, slot = self._view(parameter)
        return slot.transpose(1, 2) if columns.tall else slot

    def arrange(self, total: Tensor) -> Tensor:
        """Bring a sum of rows (P,) into the parameters' own layout and order."""
        arranged = torch.empty_like(total)
        for columns in self._columns.values():
            source, target = (each[columns.start : columns.stop] for each in (total, arranged))
            if columns.tall:
                target.view(columns.shape).copy_(source.view(columns.shape[::-1]).t())
            else:
                target.copy_(source)
        return arranged

    def _slot(self, parameter: Tensor) -> tuple[_Columns, Tensor]:
        if not self.records:
            raise PrivacyError("not-recording", "a backward pass ran outside the per-record engine's own.")
        return self._view(parameter)

    def _view(self, parameter: Tensor) -> tuple[_Columns, Tensor]:
        """Return a parameter's columns as (records, *shape), kept for the next batch of as many records."""
        columns = self._columns[id(parameter)]
        if columns.slot is None or len(columns.slot) != self.records:
            shape = columns.shape[::-1] if columns.tall else columns.shape
            columns.slot = self._buffer[: self.records, columns.start : columns.stop].view(self.records, *shape)
        return columns, columns.slot


def _put(columns: _Columns, slot: Tensor, values: Tensor) -> None:
    """Add to what this pass has written, or overwrite what an earlier pass has left."""
    if columns.written:
        slot.add_(values)
    else:
        slot.copy_(values)


def _columns(start: int, shape: torch.Size) -> _Columns:
    tall = len(shape) == 2 and shape[0] > shape[1]  # noqa: PLR2004 - a weight
    return _Columns(start, shape, start + shape.numel(), tall)
