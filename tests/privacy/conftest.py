"""Tiny random models with LoRA and a batch for each, built on the spot; and the engines by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.adapted import Case, make_case

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedtune.privacy.engines import EngineName


@pytest.fixture
def tiny() -> Callable[..., Case]:
    return make_case


@pytest.fixture(params=["lora", "opacus"])
def engine(request: pytest.FixtureRequest) -> EngineName:
    """What is said of any engine is said of both."""
    name: EngineName = request.param
    return name


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
