"""How much a round trains and sends, from layouts alone: what a plan says and a site's policy bounds."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.aggregation.compression.codec import Codec
from fedtune.aggregation.lora.factors import only
from fedtune.aggregation.lora.protocol import Algorithm, Turn
from fedtune.model.layout import AdapterLayout

_FLOAT = 4
_TURNS = 1, 2  # rounds take turns in at most two kinds


@dataclass(frozen=True, slots=True)
class Sizes:
    """The most that a round trains, and that a site sends and is sent in one: numbers, and bytes of what it sends.

    `download` is that of a site that missed no round; where the base changes, of a round that all sites took part in.
    """

    trained: int
    upload: int
    upload_bytes: int
    download: int


def sizes_of(algorithm: Algorithm, codec: Codec | None, layout: AdapterLayout, sites: int) -> Sizes:
    """Return the sizes at a site of this layout in a study of so many sites."""
    parts = range(algorithm.traits.exchanges)
    rounds = [[Turn(number, part) for part in parts] for number in _TURNS]
    ups = [[algorithm.up(layout, turn) for turn in turns] for turns in rounds]
    return Sizes(
        max(algorithm.site.trained(layout, turn).size for turns in rounds for turn in turns),
        max(sum(up.size for up in exchange) for exchange in ups),
        max(sum(_bytes(up, codec) for up in exchange) for exchange in ups),
        max(sum(algorithm.down(layout, turn, 0).size for turn in turns) for turns in rounds)
        + _increments(algorithm, layout, sites),
    )


def _bytes(up: AdapterLayout, codec: Codec | None) -> int:
    return _FLOAT * up.size if codec is None else sum(codec.lengths(up).values())


def _increments(algorithm: Algorithm, layout: AdapterLayout, sites: int) -> int:
    return sites * only(layout, "lora_A", "lora_B").size if algorithm.traits.changes_base else 0
