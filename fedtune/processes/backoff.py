"""How long to wait before a process is started again. Knows no process and no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses of `first`, `first`·`factor`, … up to `longest` seconds; a child that stayed `steady` seconds begins anew.

    No jitter: the processes of one machine compete for nothing when they start.
    """

    first: float = 1.0
    factor: float = 2.0
    longest: float = 60.0
    steady: float = 60.0

    def after(self, pause: float, stayed: float) -> float:
        """Return the next pause (s), given the last one (0: there was none) and how long the child was ready (s)."""
        if pause <= 0 or stayed >= self.steady:
            return min(self.first, self.longest)
        return min(pause * self.factor, self.longest)
