"""Tiny base models, saved once a session, and workspaces built from them."""

from __future__ import annotations

import shutil
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.data.tasks import Task
from fedtune.model.base import find_base
from fedtune.model.build import Recipe, build
from tests.support.tiny import tiny_base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fedtune.model.workspace import Workspace

LABELS = Task("classification", {"text": "text", "label": "label"}, ("card_fee", "cash-out", "loan"))
TEXT = Task("text", {"text": "text"})


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    torch.set_num_threads(1)

    @cache
    def make(architecture: str) -> Path:
        return tiny_base(tmp_path_factory.mktemp("bases") / architecture, architecture)

    return make


@pytest.fixture
def own_base(base: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a base that a test may change."""

    def make(architecture: str = "bert", name: str = "own") -> Path:
        return shutil.copytree(base(architecture), tmp_path / name)

    return make


@pytest.fixture(scope="session")
def workspace(base: Callable[[str], Path]) -> Callable[..., Workspace]:
    def make(where: str | Path, head: str = "pooled", **changes: Any) -> Workspace:
        folder = base(where) if isinstance(where, str) else where
        lora = {"rank": 2, "alpha": 4.0, **changes.pop("lora", {})}
        recipe = {
            "task": TEXT if head == "none" else LABELS,
            "lora": LoraSettings(**lora),
            "head": head,
            "head_init": "zero",
            "head_center": "none",
            "head_scale": 1.0,
            "dtype": "float32",
            "seed": 3,
            "max_tokens": 24,
        }
        return build(find_base(ModelSettings(base=str(folder))), Recipe(**{**recipe, **changes}), "cpu")

    return make
