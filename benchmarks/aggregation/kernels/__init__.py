"""`python -m benchmarks.aggregation kernels`: speed and memory of the coordinator's arithmetic."""

from __future__ import annotations

from benchmarks.aggregation.kernels.command import main

__all__ = ["main"]
