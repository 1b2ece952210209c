"""Studies whose sites are scripted, and a coordinator that sites enrol with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.config.machine import ENVIRONMENT_VARIABLE
from tests.support.enrolments import Coordinator, MakeSite, Site
from tests.support.studies import TinyStudy, tiny_study
from tests.support.tiny import bank_csv, tiny_base

MakeStudy = Callable[..., TinyStudy]


@pytest.fixture(scope="session")
def base_and_records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_base(folder / "base"), bank_csv(folder / "bank.csv")


@pytest.fixture
def make_study(base_and_records: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStudy:
    """Return a maker of studies, each in a run folder of its own: 4 sites and 2 rounds unless overridden."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")

    def make(*overrides: str) -> TinyStudy:
        run_dir = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        run_dir.mkdir()
        return tiny_study(*base_and_records, run_dir, "federation.sites=4", "federation.rounds=2", *overrides)

    return make


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "coordinator")


@pytest.fixture
def make_site(tmp_path: Path, coordinator: Coordinator) -> MakeSite:
    def make(name: str = "hospital-a", folder: str = "") -> Site:
        return Site.make(tmp_path / (folder or name), name, coordinator.now)

    return make
