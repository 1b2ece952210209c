"""The figures as Markdown; computes nothing but ratios."""

from __future__ import annotations

from typing import Any


def render(result: dict[str, Any]) -> str:
    """Return the machine and the tables that were measured."""
    parts = [", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    makers = {"mean": _mean, "layer": _layer, "memory": _memory}
    return "\n\n".join(parts + [make(result[name]) for name, make in makers.items() if name in result])


def _mean(rows: list[dict[str, Any]]) -> str:
    head = [
        "adapter, MiB",
        "copy, GB/s",
        "plain float64 sum, GB/s",
        "streaming mean, GB/s",
        "sum / copy",
        "mean / copy",
    ]
    cells = []
    for row in rows:
        speeds = [f"{row[f'{name}_gb_s']:.2f}" for name in ("copy", "plain", "mean")]
        cells.append([f"{row['mebibytes']:g}", *speeds, *(_spread(row["ratios"][name]) for name in ("plain", "mean"))])
    return _table(head, cells)


def _spread(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _layer(found: dict[str, Any]) -> str:
    dense = found["dense_svd"]
    rows = [[f"`{name}`", f"{took:.4f}", f"{dense / took:,.0f}"] for name, took in found["seconds"].items()]
    rows.append(["SVD of the dense mean product", f"{dense:.2f}", "1"])
    about = f"One layer, d_in = d_out = {found['side']}, rank {found['rank']}, {found['sites']} sites:"
    gap = f"`flexlora`'s product and the dense one cut to the same rank differ by {found['largest_difference']:.1e}."
    return "\n\n".join([about, _table(["", "CPU seconds", "times faster than the dense SVD"], rows), gap])


def _memory(found: dict[str, Any]) -> str:
    cohorts = list(found["rows"][0]["by_sites"])
    head = ["", "one reply, MiB", *(f"{sites} sites" for sites in cohorts), f"on disk at {cohorts[-1]}"]
    return _table(head, [_memory_row(row, cohorts) for row in found["rows"]])


def _memory_row(row: dict[str, Any], cohorts: list[str]) -> list[str]:
    bound = "" if row["most_mebibytes"] is None else f", at most {row['most_mebibytes']} MiB in memory"
    last = row["by_sites"][cohorts[-1]]
    peaks = [f"{row['by_sites'][sites]['peak_mib']:,.1f}" for sites in cohorts]
    return [f"`{row['algorithm']}`{bound}", f"{last['reply_mib']:.3f}", *peaks, f"{last['spilled_mib']:,.0f}"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ruler, *rows])
