"""A view of a journal for whoever reads it once: what was spent and by whom, but not every round.

`SiteState` keeps every reservation, because a site may be asked for any of them again. An audit of a million records
needs only to know which there were: a bit each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedtune.journal.spending import Spending
from fedtune.journal.state import SiteState


def slim_state() -> SiteState:
    """Return a state that refuses what every state refuses and forgets what its reservations and payloads are."""
    return SiteState(spending=Spending(reserved=Marks(), _attempts=_Forgetful()), committed=Marks(), sent=Marks())


class Marks(dict[int, Any]):
    """Which records were put in, a bit each; what they say is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self._bits = bytearray()

    def __setitem__(self, number: int, _value: object) -> None:
        place = number >> 3
        if place >= len(self._bits):
            self._bits.extend(bytes(place + 1 - len(self._bits)))
        self._bits[place] |= 1 << (number & 7)

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int) or not 0 <= number >> 3 < len(self._bits):
            return False
        return bool(self._bits[number >> 3] >> (number & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        return (number for number in range(8 * len(self._bits)) if number in self)

    def __len__(self) -> int:
        return sum(byte.bit_count() for byte in self._bits)

    def get(self, number: int, default: Any = None) -> Any:
        """Return 1 for a record that was put in."""
        return 1 if number in self else default


class _Forgetful(dict[Any, Any]):
    """Keeps nothing."""

    def setdefault(self, _key: Any, default: Any = None) -> Any:
        """Return the default."""
        return default
