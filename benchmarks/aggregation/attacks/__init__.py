"""`python -m benchmarks.aggregation attacks`: what each robust rule withstands in the real pipeline."""

from __future__ import annotations

from benchmarks.aggregation.attacks.command import main

__all__ = ["main"]
