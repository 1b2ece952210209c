"""The coordinator: rounds, validation, checkpoints."""

import fedtune.flower  # noqa: F401 - turns Flower's telemetry off before any module here imports Flower
