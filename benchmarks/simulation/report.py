"""Tables of the measurements, as text, Markdown or JSON. Computes nothing but ratios."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Row = list[str]


def render(result: dict[str, Any], form: str) -> str:
    """Return the whole report."""
    if form == "json":
        return json.dumps(result, indent=2, sort_keys=True)
    table = _markdown if form == "markdown" else _aligned
    parts = ["; ".join(f"{name} {value}" for name, value in result["machine"].items())]
    if "trivial" in result:
        parts += [table(_trivial_head(), [_trivial_row(row) for row in result["trivial"]["rows"]])]
        parts += _split(result["trivial"]["rows"])
        parts += [f"Ray left out: {result['trivial']['ray_skipped']}"] if result["trivial"]["ray_skipped"] else []
    if "real" in result:
        parts += [_real(result["real"], table)]
    return "\n\n".join(parts)


def _split(rows: list[dict[str, Any]]) -> list[str]:
    """Return what one more site costs, and what a round costs whatever its sites, by its smallest and largest size."""
    first, last = rows[0], rows[-1]
    more = last["sites"] - first["sites"]
    if more <= 0:
        return []
    each = (last["inprocess"]["seconds"] - first["inprocess"]["seconds"]) / more
    fixed = first["inprocess"]["seconds"] - each * first["sites"]
    peak = last["inprocess"]["peak_mb"] - first["inprocess"]["peak_mb"]
    text = (
        f"One more site: {1e3 * each:.2f} ms a round. A round whatever its sites (checkpoint on disk, ε, log): "
        f"{1e3 * fixed:.1f} ms. Peak memory from {first['sites']} to {last['sites']} sites: {peak:+.1f} MB."
    )
    return [text]


def _trivial_head() -> Row:
    return ["sites", "s a round", "ms a site", "peak MB", "Ray: s a round", "Ray: ms a site", "Ray / fedtune"]


def _trivial_row(row: dict[str, Any]) -> Row:
    own, ray = row["inprocess"], row.get("ray")
    cells = [str(row["sites"]), f"{own['seconds']:.4f}", f"{own['ms_a_site']:.2f}", f"{own['peak_mb']:.0f}"]
    if ray is None:
        return [*cells, "-", "-", "-"]
    return [*cells, f"{ray['seconds']:.2f}", f"{ray['ms_a_site']:.1f}", f"{ray['seconds'] / own['seconds']:.0f}"]


def _real(real: dict[str, Any], table: Callable[[Row, list[Row]], str]) -> str:
    if "skipped" in real:
        return f"The real job was left out: {real['skipped']}"
    loop, fedtune = real["loop"], real["fedtune"]
    names = {
        "wall": "seconds, whole process",
        "startup": "- before the first round",
        "rounds": "- rounds",
        "beside": "-- of them beside training",
        "end": "- after the last round",
        "cpu": "CPU seconds, whole process",
        "cpu_startup": "- before the first round",
        "cpu_rounds": "- rounds",
        "cpu_beside": "-- of them beside training",
        "cpu_end": "- after the last round",
        "peak_mb": "peak memory, MB",
    }
    rows = [
        [label, f"{loop[key]:.2f}", f"{fedtune[key]:.2f}", _more(loop[key], fedtune[key])]
        for key, label in names.items()
    ]
    about = (
        f"{fedtune['cpu_to_plan']:.1f} CPU seconds of fedtune's start are imports and the plan; "
        f"{real['rows']} rows, {real['rounds_of_study']} rounds, {real['threads']} thread(s); "
        f"largest difference between the two adapters: {real['largest_difference']:.1e}"
    )
    return table(["", "plain loop", "fedtune", "more"], rows) + "\n\n" + about


def _more(loop: float, fedtune: float) -> str:
    return f"{100 * (fedtune / loop - 1):+.1f} %" if loop > 0.1 else f"{fedtune - loop:+.2f}"


def _aligned(head: Row, rows: list[Row]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(lines)


def _markdown(head: Row, rows: list[Row]) -> str:
    ruler = ["---:"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ruler, *rows])
