"""One site's adapter after a private round, ready for release."""

from __future__ import annotations

import pytest
import torch

from tests.support.bench import Bench, make_bench


@pytest.fixture(scope="session")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("pooled"), model__head_init="labels", model__head_center="labels")


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("language"), "llama", "none")
