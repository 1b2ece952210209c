"""What a figure was measured on; imports nothing heavy."""

from __future__ import annotations

from importlib.metadata import version

from benchmarks.simulation.machine import machine as whole_machine

_PACKAGES = ("torch", "transformers", "peft", "opacus", "numpy")


def machine() -> dict[str, str]:
    """Return processor, memory and load before the measurement, and the versions that matter for a step."""
    facts = {name: value for name, value in whole_machine().items() if name not in {"flwr", "ray"}}
    return facts | {name: version(name) for name in _PACKAGES}
