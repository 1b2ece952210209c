"""A simulation is nobody's real site and nobody's real coordinator, whatever folders its shell has exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.run.folder import RunFolder
from tests.support.runs import Study, command


def test_a_simulation_leaves_real_folders_alone(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEDTUNE_SITE", "FEDTUNE_COORDINATOR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    run = tmp_path / "run"
    command("simulate", *study.words(f"run.dir={run}"))
    assert RunFolder(run).summary() is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
