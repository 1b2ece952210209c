"""Bases and adapters of every family, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.release.gguf.made import made_adapter, made_base


@dataclass
class Shelf:
    """Makes a family's base and adapter when they are first asked for."""

    root: Path

    def base(self, family: str) -> Path:
        folder = self.root / family
        return folder if folder.exists() else made_base(folder, family)

    def adapter(self, family: str) -> Path:
        folder = self.root / f"{family}-adapter"
        return folder if folder.exists() else made_adapter(folder, self.base(family))


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    torch.set_num_threads(1)
    return Shelf(tmp_path_factory.mktemp("shelf"))
