from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.site_journals import Site

FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say how many attacks were made and found; the figures are printed after the tests."""
    stash = request.config.stash
    return stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(FIGURES, [])
    if figures:
        terminalreporter.section("attacks on a journal")
    for line in figures:
        terminalreporter.line(line)
