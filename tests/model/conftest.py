"""Tiny base models, saved once a session, and workspaces built from them."""

from __future__ import annotations

import shutil
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fedtune.config.plan import ModelPlan
from fedtune.config.schema import LoraSettings, ModelSettings
from fedtune.data.tasks import Task
from fedtune.model.base import BaseModel, find_base
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


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same with three layers."""

    @cache
    def make(architecture: str) -> Path:
        layers = {"n_layer": 3} if architecture == "gpt2" else {"num_hidden_layers": 3}
        return tiny_base(tmp_path_factory.mktemp("deep") / architecture, architecture, **layers)

    return make


@pytest.fixture
def own_base(base: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a base that a test may change."""

    def make(architecture: str = "bert", name: str = "own") -> Path:
        return shutil.copytree(base(architecture), tmp_path / name)

    return make


def model_words(base: BaseModel, head: str, **changes: Any) -> ModelPlan:
    """What a plan says of a model, with the defaults of the settings."""
    said = {key: value for key, value in ModelSettings().model_dump().items() if key in ModelPlan.model_fields}
    named = {"name": base.name, "sha256": base.sha256, "architecture": base.architecture, "head": head}
    return ModelPlan(**{**said, **named, **changes})


@pytest.fixture(scope="session")
def workspace(base: Callable[[str], Path]) -> Callable[..., Workspace]:
    def make(where: str | Path, head: str = "pooled", **changes: Any) -> Workspace:
        folder = base(where) if isinstance(where, str) else where
        lora = {"rank": 2, "alpha": 4.0, **changes.pop("lora", {})}
        found, device = find_base(ModelSettings(base=str(folder))), changes.pop("device", "cpu")
        words = {key: changes.pop(key) for key in set(changes) & set(ModelPlan.model_fields)}
        recipe = {
            "task": TEXT if head == "none" else LABELS,
            "lora": LoraSettings(**lora),
            "model": model_words(found, head, **words),
            "seed": 3,
            "max_tokens": 24,
        }
        return build(found, Recipe(**{**recipe, **changes}), device)

    return make
