"""The figures as Markdown."""

from __future__ import annotations

from typing import Any


def render(result: dict[str, Any]) -> str:
    """Return the tables."""
    return "\n".join([_machine(result["machine"]), "", *_charges(result), "", *_reading(result["reading"])])


def _machine(machine: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _charges(result: dict[str, Any]) -> list[str]:
    lines = ["| on disk before it returns | a second (quartiles) | ms |", "| --- | ---: | ---: |"]
    for name, rate in result["charges"].items():
        quartiles = f"{rate['low']:,.0f}-{rate['high']:,.0f}"
        lines.append(f"| {name} | {rate['median']:,.0f} ({quartiles}) | {1e3 / rate['median']:.3f} |")
    composed = result["composed_s"]
    return [*lines, f"| fedtune: RESERVE, its ε composed | {1 / composed:,.0f} | {1e3 * composed:.1f} |"]


def _reading(reading: dict[str, Any]) -> list[str]:
    records, seconds = reading["records"], reading["seconds"]
    lines = [
        "| checking a journal | |",
        "| --- | ---: |",
        f"| records | {records:,} |",
        f"| size | {reading['bytes'] / 1e6:,.1f} MB |",
        f"| time | {seconds:.1f} s (CPU {reading['cpu_s']:.1f} s) |",
        f"| records a second | {records / seconds:,.0f} |",
        f"| memory beyond the imports | {reading['grown_kb'] / 1e3:.1f} MB |",
        "",
        "| record | bytes |",
        "| --- | ---: |",
    ]
    return lines + [f"| {kind} | {size} |" for kind, size in reading["sizes"].items()]
