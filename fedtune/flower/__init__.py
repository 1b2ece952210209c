"""Every symbol of Flower that fedtune uses: messages, the in-process grid, the Ray engine.

Flower's telemetry and update check are off before its first import; a person can turn them on by setting the variables.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
