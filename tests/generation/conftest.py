"""Tokenizers of several kinds, and one site's language model after a private round."""

from __future__ import annotations

import pytest
import torch

from tests.data.conftest import make_table, make_tokenizer, stories
from tests.support.bench import Bench, make_bench

__all__ = ["make_table", "make_tokenizer", "stories"]


@pytest.fixture(scope="session", params=["llama", "gpt2", "gemma", "qwen2"])
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    bench = make_bench(tmp_path_factory.mktemp(request.param), request.param, "none")
    bench.workspace.load(bench.alive())
    return bench
