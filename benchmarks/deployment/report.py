"""The figures as Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.deployment.federations import PARTS


def render(result: dict[str, Any]) -> str:
    """Return the machine and the tables that were measured."""
    parts = [", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    if "transfer" in result:
        head = ["MiB", "", "s down", "s up", "CPU s", *(f"{part}, MiB" for part in PARTS), "state on disk, MiB"]
        parts.append(_table(head, [_transfer(row) for row in result["transfer"]]))
    if "rounds" in result:
        head = ["sites", "", "s a round beside training", "CPU s a round", "all processes, MiB"]
        parts.append(_table(head, [_rounds(row) for row in result["rounds"]]))
    return "\n\n".join(parts)


def _transfer(row: dict[str, Any]) -> list[str]:
    cells = [str(row["mebibytes"]), row["peer"]]
    if "seconds" not in row:
        return [*cells, f"failed: {row['failed'][0]}", *[""] * (len(PARTS) + 3)]
    peaks = [f"{row['peaks'][part]:,.0f}" for part in (*PARTS, "disk")]
    return [*cells, f"{row['down']:.1f}{_some_failed(row)}", f"{row['up']:.1f}", f"{row['cpu']:.1f}", *peaks]


def _rounds(row: dict[str, Any]) -> list[str]:
    cells = [str(row["sites"]), row["peer"]]
    if "seconds" not in row:
        return [*cells, f"failed: {row['failed'][0]}", "", ""]
    peaks, sites = row["peaks"], row["sites"]
    whole = peaks["link"] + peaks["coordinator executor"] + sites * (peaks["node"] + peaks["site executor"])
    return [*cells, f"{row['seconds']:.2f}{_some_failed(row)}", f"{row['cpu']:.2f}", f"{whole:,.0f}"]


def _some_failed(row: dict[str, Any]) -> str:
    return f" ({len(row['failed'])} failed)" if "failed" in row else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---:", "---", *["---:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ruler, *rows])
