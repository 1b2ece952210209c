"""Numbers and foreign text as people read them in a terminal. Knows no study and no terminal."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

bars = "▁▂▃▄▅▆▇█"
minute, hour = 60, 3600
kilo = 1000


def printable(text: object) -> str:
    r"""Escape what a terminal would act on: names and messages can quote records, and records can hold anything.

    Line feeds stay; other control characters, lone surrogates and invisible format characters become `\x1b`-like.
    """
    return "".join(char if char.isprintable() or char == "\n" else _escaped(char) for char in str(text))


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def epsilon_text(epsilon: float | None) -> str:
    """Three decimals, rounded up, so that less is never shown than was spent (below 1e-9 is float noise)."""
    if epsilon is None or not math.isfinite(epsilon):
        return "-" if epsilon is None else "inf"
    return f"{Decimal(f'{epsilon:.9f}').quantize(Decimal('0.001'), ROUND_CEILING):f}"


def metric_text(value: float | None) -> str:
    """Four significant digits; `-` when there is none."""
    return "-" if value is None else f"{value:#.4g}"


def change_text(before: float | None, after: float | None) -> str:
    """Write the signed difference, `-` when one side is missing."""
    if before is None or after is None:
        return "-"
    return f"{after - before:+#.4g}"


def bytes_text(count: float) -> str:
    """Decimal units: 1 MB is 1,000,000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < kilo:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= kilo
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    """`8.3 s`, `4m07s`, `2h05m`."""
    if round(seconds, 1) < minute:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < hour:
        return f"{whole // minute}m{whole % minute:02d}s"
    return f"{whole // hour}h{whole % hour // minute:02d}m"


def trend_text(values: Sequence[float], width: int = 16) -> str:
    """Draw the last `width` values as bars from the smallest to the largest of them; non-finite ones are blank."""
    shown = values[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return " " * len(shown)
    low, span = min(finite) / 2, max(finite) / 2 - min(finite) / 2  # halves: no difference of two floats overflows
    return "".join(
        _bar((value / 2 - low) / span if span > 0 else 0.5) if math.isfinite(value) else " " for value in shown
    )


def _bar(share: float) -> str:
    return bars[min(int(share * len(bars)), len(bars) - 1)]
