"""The measurements as tables (text or Markdown), or as one line of JSON. Computes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Found = dict[str, Any]
Table = Callable[[list[str], list[list[str]]], str]

NAMES = {
    "peft": "PEFT, not private",
    "fedtune": "fedtune, private",
    "fedtune_nonprivate": "fedtune, not private",
    "opacus_hooks": "Opacus hooks",
    "opacus_ghost": "Opacus ghost",
    "functorch": "functorch",
}
_SIDES = {
    "peft_loop": "plain PEFT in a loop, not private",
    "fedtune_lora": "fedtune simulate, engine=lora",
    "fedtune_opacus": "fedtune simulate, engine=opacus",
}


def render(result: Found, form: str) -> str:
    """Return the whole report; JSON is one line."""
    if form == "json":
        return json.dumps(result, sort_keys=True)
    table = _markdown if form == "markdown" else _aligned
    parts = ["; ".join(f"{name} {value}" for name, value in result["machine"].items())]
    drawn: dict[str, Callable[[Any, Table], str]] = {
        "configurations": _configurations,
        "real": _real,
        "scaling": _scaling,
        "endtoend": _endtoend,
        "large": _large,
    }
    parts += [draw(result[name], table) for name, draw in drawn.items() if name in result]
    return "\n\n".join(parts)


def _configurations(rows: list[Found], table: Table) -> str:
    peers = list(rows[0]["time"])
    head = [
        "CPU time, ratio to PEFT's step",
        "PEFT ms",
        *(NAMES[peer] for peer in peers[1:]),
        "fedtune, private / not private",
    ]
    lines = [
        [
            row["words"],
            f"{row['time']['peft']['ms']:.1f}",
            *(_ratio(row["time"][peer]) for peer in peers[1:]),
            _number(row["ratio_to_fused_nonprivate"], row["spread"]["fused"]),
        ]
        for row in rows
    ]
    parts = [table(head, lines)]
    remembered = [row for row in rows if row["memory"]]
    if remembered:
        measured = list(remembered[0]["memory"])
        shown = [[row["words"], *(_peak(row["memory"][peer]) for peer in measured)] for row in remembered]
        parts += [table(["peak MB (above the imports)", *(NAMES[peer] for peer in measured)], shown)]
    return "\n\n".join(parts + _failures(rows))


def _failures(rows: list[Found]) -> list[str]:
    """Return one line for each peer that failed, with its error."""
    found = [
        f"{row['words']}: {NAMES[peer]}, {part}: {figures['failed']}"
        for row in rows
        for part in ("time", "memory")
        for peer, figures in row[part].items()
        if "failed" in figures
    ]
    return ["\n".join(found)] if found else []


def _real(real: Found, table: Table) -> str:
    if "skipped" in real:
        return f"{real['data']} was left out: {real['skipped']}"
    parts = []
    for targets, found in real["targets"].items():
        about = found["batches"]
        line = (
            f"{real['data']}, {targets.replace('qv', 'q,v')}: {about['records_a_step']:.1f} records a step in "
            f"{about['physical_batches_a_step']:.1f} physical batches, {about['tokens_a_record']:.1f} tokens a record, "
            f"{100 * about['padding']:.0f} % padding"
        )
        lines = [[NAMES[peer], *_real_cells(figures)] for peer, figures in found["peers"].items()]
        parts += [line, table(["", "ms a step", "ratio", "records a second"], lines)]
    return "\n\n".join(parts)


def _real_cells(figures: Found) -> list[str]:
    if "failed" in figures:
        return [_ratio(figures), "", ""]
    return [f"{figures['ms']:.1f}", _ratio(figures), f"{figures['records_per_s']:.1f}"]


def _scaling(scaling: Found, table: Table) -> str:
    head = ["varied", "", "ms", "predicted ms", "GFLOP", "+ privacy, %", "rows, MB", "peak MB (above the imports)"]
    lines = [
        [
            row["varied"],
            str(row["value"]),
            "fails" if row["ms"] is None else f"{row['ms']:.1f}",
            f"{row['predicted_ms']:.1f}",
            f"{row['operations'] / 1e9:.3g}",
            f"{100 * row['extra_operations'] / row['operations']:.3f}",
            f"{row['store_mb']:.3g}",
            _peak(row["memory"]) if row["memory"] else "-",
        ]
        for row in scaling["rows"]
    ]
    about = f"Around {scaling['base']}; fitted: {scaling['operations_per_s'] / 1e9:.1f} GFLOP a second."
    return about + "\n\n" + table(head, lines)


def _endtoend(found: Found, table: Table) -> str:
    if "skipped" in found:
        return f"The whole study was left out: {found['skipped']}"
    about = f"BANKING77, {found['rows']} rows, {found['steps']} steps a site, {found['targets'].replace('qv', 'q,v')}"
    head = ["", "records", "records a second", "a CPU second", "a CPU second of training"]
    keys = ("records_per_s", "records_per_cpu_s", "records_per_training_cpu_s")
    lines = [
        [_SIDES[side], f"{figures['records']:.0f}", *(f"{figures[key]:.1f}" for key in keys)]
        for side, figures in found["sides"].items()
    ]
    return about + "\n\n" + table(head, lines)


def _large(found: Found, table: Table) -> str:
    if "skipped" in found:
        return f"The large shape was left out: {found['skipped']}"
    head = ["", "ms", "ratio", "peak MB", "memory ratio", "tokens a second", f"of {found['peak_tflops']:g} TFLOP/s"]
    memory = found["memory"]
    lines = [[NAMES[peer], *_large_cells(each, memory.get(peer, {}))] for peer, each in found["time"].items()]
    return f"{found['words']} on {found['gpu']}\n\n" + table(head, lines)


def _large_cells(figures: Found, memory: Found) -> list[str]:
    if "failed" in figures:
        return [_ratio(figures), *[""] * 5]
    peak = f"{memory['peak_mb']:.0f}" if "peak_mb" in memory else memory.get("failed", "-")
    share = f"{100 * figures['share_of_peak']:.1f} %"
    ratios = _ratio(figures), peak, _number(memory.get("ratio"))
    return [f"{figures['ms']:.1f}", *ratios, f"{figures['tokens_per_s']:.0f}", share]


def _ratio(figures: Found) -> str:
    """Write a median and its quartiles, or the class of the error."""
    if "failed" in figures:
        return str(figures["failed"]).split(":", 1)[0]
    return _number(figures["ratio"], [figures["ratio_low"], figures["ratio_high"]])


def _number(value: float | None, spread: list[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({spread[0]:.3f}-{spread[1]:.3f})" if spread else "")


def _peak(memory: Found) -> str:
    if "failed" in memory:
        return str(memory["failed"]).split(":", 1)[0]
    return f"{memory['peak_mb']:.0f} ({memory['above_imports_mb']:.0f})"


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ruler, *rows])
