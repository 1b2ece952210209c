"""Which GPU there is; imports torch alone, so that asking is cheap."""

from __future__ import annotations

from typing import Any

import torch


def gpu(_settings: dict[str, Any]) -> dict[str, Any]:
    """Return the name of the GPU, empty without one."""
    return {"name": torch.cuda.get_device_name() if torch.cuda.is_available() else ""}
