"""Whether a site's reply may enter the mean: the one gate between a message and the sum.

A refusal is an error whose code names the reason, so that the coordinator drops and counts this reply and finishes the
round with the others. Messages name tensors and never quote a value of one.

| code | the reply |
|---|---|
| `message.missing-key` | lacks a tensor of the layout |
| `message.unknown-key` | has a tensor that the layout does not have |
| `message.wrong-shape` | has a tensor of another shape |
| `message.wrong-dtype` | has a tensor that is not float32 in this machine's byte order |
| `aggregation.not-finite` | has a NaN or an infinity |
| `aggregation.oversized-norm` | is farther from the reference than the plan's bound |
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from fedtune.errors import AggregationError, MessageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from numpy.typing import NDArray

    from fedtune.model.layout import AdapterLayout, AdapterState

_SHOWN: Final = 80  # characters of a name that another machine chose


def validate(
    state: Mapping[str, NDArray[Any]], layout: AdapterLayout, *, max_norm: float, reference: AdapterState
) -> None:
    """Raise unless `state` has exactly the layout's tensors, all finite, within `max_norm` of `reference`.

    The norm is the L2 norm of the whole difference `state − reference`, in float64, which no float32 difference can
    overflow. `reference` is the global adapter that the sites started from; tensors of it outside the layout are
    ignored. The module's table lists the errors.
    """
    _check_names(state, layout)
    squares = 0.0
    for spec in layout.tensors:
        array = state[spec.name]
        if array.shape != spec.shape:
            raise MessageError("wrong-shape", f"tensor {spec.name} has shape {array.shape}, not {spec.shape}")
        if array.dtype != np.float32:
            raise MessageError("wrong-dtype", f"tensor {spec.name} is not float32")
        difference = np.subtract(array, reference[spec.name], dtype=np.float64).ravel()
        square = float(difference @ difference)
        if not math.isfinite(square):  # the reference is finite, so a NaN or an infinity came with the reply
            raise AggregationError("not-finite", f"tensor {spec.name} holds a NaN or an infinity")
        squares += square
    if math.sqrt(squares) > max_norm:
        raise AggregationError(
            "oversized-norm",
            f"the update is longer than the plan's bound of {max_norm:g}",
            hint="raise aggregation.max_update_norm if updates of this size are meant",
        )


def _check_names(state: Mapping[str, NDArray[Any]], layout: AdapterLayout) -> None:
    expected = dict.fromkeys(layout.names)
    for name in expected:
        if name not in state:
            raise MessageError("missing-key", f"tensor {name} is missing")
    if len(state) > len(expected):
        unknown = next(name for name in state if name not in expected)
        raise MessageError("unknown-key", f"tensor {unknown!r:.{_SHOWN}} is not part of this adapter")
