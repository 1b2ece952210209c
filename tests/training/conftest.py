"""Tiny models, one of each architecture and head, made once."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support.bench import Bench, make_bench

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    torch.set_num_threads(1)

    @cache
    def make(architecture: str = "bert", head: str = "pooled") -> Bench:
        return make_bench(tmp_path_factory.mktemp(f"{architecture}-{head}"), architecture, head)

    return make
