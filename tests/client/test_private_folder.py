"""Keys lie in a folder of this user alone, in memory where there is one, and never outlive the next start."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fedtune_client.private_folder import private_folder


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "memory"
    place.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    return place


def test_it_is_in_memory_private_and_gone_afterwards(memory: Path, tmp_path: Path) -> None:
    with private_folder(tmp_path / "run") as folder:
        assert folder.parent == memory
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "site.key").write_text("secret")
    assert list(memory.iterdir()) == list((tmp_path / "run").iterdir()) == []


def test_it_is_gone_also_after_an_error(memory: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), private_folder(tmp_path / "run"):
        raise KeyboardInterrupt
    assert list(memory.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed_by_the_next(memory: Path, tmp_path: Path) -> None:
    left = memory / "fedtune-site-left"
    left.mkdir()
    (left / "site.key").write_text("secret")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "private").write_bytes(bytes(left))
    with private_folder(tmp_path / "run"):
        assert not left.exists()


def test_a_note_that_names_something_else_removes_nothing(memory: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    link = memory / "fedtune-site-link"
    link.symlink_to(kept)
    (tmp_path / "run").mkdir()
    for named in (kept, link, tmp_path / "nowhere"):
        (tmp_path / "run" / "private").write_bytes(bytes(named))
        with private_folder(tmp_path / "run"):
            assert kept.exists()


def test_without_memory_it_is_in_the_sites_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune_client.private_folder._memory", lambda: None)
    with private_folder(tmp_path / "run") as folder:
        assert folder.parent == tmp_path / "run"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "not/absolute")
    with private_folder(tmp_path / "run") as folder:
        assert folder.parent in {Path("/dev/shm"), tmp_path / "run"}
