from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from fedtune.journal.verify import verify
from tests.client.commands.conftest import study
from tests.support.terminal import in_terminal

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.commands.conftest import Place

WORDS = "plenty of horse battery"


def key_file(path: Path, byte: int) -> str:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(bytes([byte]) * 32)
    return str(path)


def test_a_rotated_key_signs_from_then_on_and_every_key_checks_the_whole(ready: Place) -> None:
    old = (ready.site / "public.key").read_text().strip()
    found = ready.json("key", "rotate")
    assert set(found) == {"public_key", "before"}
    assert (found["before"], found["public_key"]) == (old, (ready.site / "public.key").read_text().strip())
    ready.charge(study(), 1)
    for key in (old, found["public_key"]):
        assert verify(ready.journal, public_key=key).outcome == "intact"
    assert ready.run("budget").code == 0


def test_an_export_brings_the_site_back_on_another_machine(ready: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.done("key", "rotate")
    monkeypatch.setenv("FEDTUNE_EXPORT_PASSPHRASE", WORDS)
    found = ready.json("vault", "export", "vault.export")
    assert set(found) == {"path", "items"}
    assert "error[vault.exists]" in ready.run("vault", "export", "vault.export").err
    assert "error[vault.exists]" in ready.run("vault", "restore", "vault.export").err
    shutil.rmtree(ready.site / "vault")
    other = key_file(ready.folder / "other.key", 7)
    back = ready.json("vault", "restore", "vault.export", "--key-file", other)
    assert set(back) == {"path", "items"}
    assert back["items"] == found["items"]
    assert "error[vault.wrong-key]" in ready.run("consent", "revoke", "3").err
    ready.done("consent", "revoke", "3", "--key-file", other)


def test_an_export_from_before_a_rotation_is_said_to_be_older(ready: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_EXPORT_PASSPHRASE", WORDS)
    ready.done("vault", "export", "vault.export")
    ready.done("key", "rotate")
    shutil.rmtree(ready.site / "vault")
    done = ready.run("vault", "restore", "vault.export")
    assert "error[vault.older-export]" in done.err
    assert "restore a newer export" in done.err


def test_without_a_secret_for_the_export_its_own_variables_are_named(ready: Place) -> None:
    done = ready.run("vault", "export", "vault.export")
    assert "error[vault.locked]: nothing is given as passphrase of the export" in done.err
    assert "FEDTUNE_EXPORT_PASSPHRASE" in done.err
    assert not (ready.folder / "vault.export").exists()


def test_the_lock_is_changed_and_the_old_one_opens_nothing(ready: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old = str(ready.folder / "vault.key")
    new = key_file(ready.folder / "new.key", 9)
    ready.done("vault", "passphrase", "--new-key-file", new)
    assert "error[vault.wrong-key]" in ready.run("key", "rotate").err
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    ready.done("key", "rotate", "--key-file", new)
    asked = [("new passphrase of the vault:", WORDS), ("once more:", WORDS)]
    words = ["client", "vault", "passphrase", "--key-file", new]
    screen = in_terminal(*words, answers=asked, folder=ready.folder)
    assert screen.code == 0, screen.text
    assert WORDS not in screen.text
    assert "error[vault.wrong-key]" in ready.run("key", "rotate", "--key-file", old).err
    screen = in_terminal("client", "key", "rotate", answers=[("passphrase of the vault:", WORDS)], folder=ready.folder)
    assert screen.code == 0, screen.text


def test_everything_is_encrypted_anew_and_the_site_goes_on(ready: Place) -> None:
    before = {path.name: path.read_bytes() for path in (ready.site / "vault").rglob("*.sealed")}
    found = ready.json("vault", "rotate")
    assert set(found) == {"vault", "generation", "items"}
    after = {path.name: path.read_bytes() for path in (ready.site / "vault").rglob("*.sealed")}
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)
    ready.done("consent", "revoke", "3")


def test_a_missing_vault_is_said_before_anybody_is_asked(ready: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    shutil.rmtree(ready.site / "vault")
    assert "error[vault.missing]" in ready.run("vault", "rotate").err
