"""A site: its records, its training, its replies."""

import fedtune.flower  # noqa: F401 - turns Flower's telemetry off before any module here imports Flower
