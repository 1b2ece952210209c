"""One tiny model and one file for all simulation tests."""

from __future__ import annotations

import pytest

from tests.support.runs import Study, make_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("study"))
