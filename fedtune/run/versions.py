"""Which versions ran: asked of the installed distributions, without importing them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_NAMED = ("fedtune", "torch", "transformers", "peft", "opacus", "dp-accounting", "flwr")


def versions() -> dict[str, str]:
    """Return the version of Python and of every library that decides a result."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _NAMED}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
