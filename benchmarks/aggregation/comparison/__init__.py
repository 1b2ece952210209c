"""`python -m benchmarks.aggregation comparison`: every algorithm on one small study, and what smaller updates cost."""

from __future__ import annotations

from benchmarks.aggregation.comparison.command import main

__all__ = ["main"]
