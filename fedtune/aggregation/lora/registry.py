"""All algorithms by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fedtune.aggregation.lora.fedask import fedask
from fedtune.aggregation.lora.fedex import fedex
from fedtune.aggregation.lora.fedit import fedit
from fedtune.aggregation.lora.fedsa import fedsa
from fedtune.aggregation.lora.fedsb import fedsb
from fedtune.aggregation.lora.fedsvd import fedsvd
from fedtune.aggregation.lora.ffa import ffa
from fedtune.aggregation.lora.flexlora import flexlora
from fedtune.aggregation.lora.flora import flora
from fedtune.aggregation.lora.hetlora import hetlora
from fedtune.aggregation.lora.protocol import Algorithm, Options
from fedtune.aggregation.lora.rolora import rolora
from fedtune.errors import AggregationError

ALGORITHMS: Final[dict[str, Callable[[Options], Algorithm]]] = {
    "fedit": fedit,
    "ffa": ffa,
    "rolora": rolora,
    "fedsvd": fedsvd,
    "fedsa": fedsa,
    "flora": flora,
    "fedex": fedex,
    "flexlora": flexlora,
    "hetlora": hetlora,
    "fedsb": fedsb,
    "fedask": fedask,
}


def get_algorithm(name: str, options: Options | None = None) -> Algorithm:
    """Return the algorithm of that name; `unknown-algorithm` names those there are."""
    if name not in ALGORITHMS:
        raise AggregationError(
            "unknown-algorithm",
            f"there is no aggregation algorithm {name!r:.40}",
            hint=f"set aggregation.algorithm to one of {', '.join(ALGORITHMS)}",
        )
    return ALGORITHMS[name](Options() if options is None else options)
