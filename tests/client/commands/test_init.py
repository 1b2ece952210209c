from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest

from fedtune.journal.verify import verify
from fedtune_client.vault import Key, Vault
from tests.support.runs import run_process
from tests.support.terminal import in_terminal

if TYPE_CHECKING:
    from tests.client.commands.conftest import Place


def snapshot(place: Place) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(place.site.rglob("*")) if path.is_file()}


def test_a_site_begins_with_a_journal_a_vault_and_files_to_edit(empty: Place) -> None:
    done = empty.done("init", "mercy")
    assert "next: edit site.yaml and policy.yaml, then: fedtune client policy check" in done.out
    assert {path.name for path in empty.site.iterdir()} == {
        "mercy.journal",
        "policy.yaml",
        "public.key",
        "site.yaml",
        "vault",
    }
    verdict = verify(empty.journal, public_key=(empty.site / "public.key").read_text().strip())
    assert (verdict.outcome, verdict.records, verdict.state.site) == ("intact", 1, "mercy")
    assert "signing-0001" in Vault.open(empty.site / "vault", empty.key).names()
    assert stat.S_IMODE(empty.journal.stat().st_mode) == 0o600
    assert empty.done("policy", "check").out.startswith("site/policy.yaml: a policy without mistakes")


def test_the_result_as_json_names_the_site_and_its_key(empty: Place) -> None:
    found = empty.json("init", "mercy", "--dir", str(empty.folder / "elsewhere"))
    assert set(found) == {"site", "folder", "identity", "public_key"}
    assert found["public_key"] == (empty.folder / "elsewhere" / "public.key").read_text().strip()


@pytest.mark.parametrize("name", ["mercy", "other"])
def test_an_existing_site_is_refused_without_harm(empty: Place, name: str) -> None:
    empty.done("init", "mercy")
    before = snapshot(empty)
    done = empty.run("init", name)
    assert (done.code, done.out) == (2, "")
    assert "error[journal.exists]: site already holds the site mercy" in done.err
    assert "hint: fedtune client journal show --site site" in done.err
    assert snapshot(empty) == before


@pytest.mark.parametrize("name", ["../mercy", "mercy/x", "", ".hidden", "a" * 65, "mercy\x1b[31m"])
def test_a_name_that_is_no_name_makes_nothing(empty: Place, name: str) -> None:
    done = empty.run("init", name)
    assert done.code == 2
    assert "config.bad-name" in done.err
    assert "\x1b" not in done.err
    assert not empty.site.exists()


@pytest.mark.parametrize("name", ["null", "yes", "1e5", "a" * 64])
def test_a_name_that_yaml_takes_for_something_else_is_a_name(empty: Place, name: str) -> None:
    empty.done("init", name)
    assert empty.json("policy", "check")["in_force"] is False
    assert empty.json("key", "rotate")["public_key"]


def test_an_interrupted_init_is_finished_under_its_own_name_alone(empty: Place) -> None:
    empty.done("init", "mercy")
    key = (empty.site / "public.key").read_bytes()
    empty.journal.write_bytes(empty.journal.read_bytes()[:40])  # killed while its first record was written
    assert "config.other-site" in empty.run("init", "other").err
    empty.done("init", "mercy")
    assert (empty.site / "public.key").read_bytes() == key
    assert empty.kinds() == ["site-created"]


def test_without_a_secret_the_variables_are_named(empty: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    done = empty.run("init", "mercy")
    assert "error[vault.locked]: nothing is given as passphrase of the vault" in done.err
    assert "FEDTUNE_VAULT_KEY_FILE, FEDTUNE_VAULT_KEY or FEDTUNE_VAULT_PASSPHRASE" in done.err
    assert not empty.site.exists()


def test_a_key_file_that_others_may_read_is_refused_with_the_command_that_mends_it(empty: Place) -> None:
    (empty.folder / "vault.key").chmod(0o644)
    done = empty.run("init", "mercy")
    assert "error[vault.permissions]" in done.err
    assert "hint: chmod go-rwx " in done.err
    assert not empty.site.exists()


def test_a_folder_that_cannot_be_made_is_said_of_the_site(empty: Place) -> None:
    done = empty.run("init", "mercy", "--site", str(empty.folder / "claims.csv" / "site"))
    assert done.code == 2
    assert "error[config.unwritable]" in done.err
    assert "--site DIR names another" in done.err


def test_a_passphrase_is_asked_for_twice_at_the_terminal_and_never_shown(
    empty: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    words = "plenty of horse battery"
    asked = [("passphrase of the vault:", words), ("once more:", "another"), ("passphrase of the vault:", words)]
    screen = in_terminal("client", "init", "mercy", answers=[*asked, ("once more:", words)], folder=empty.folder)
    assert screen.code == 0, screen.text
    assert "the site mercy is made in site" in screen.text
    assert words not in screen.text
    monkeypatch.setenv("FEDTUNE_VAULT_PASSPHRASE", words)
    assert empty.done("key", "rotate").out.startswith("the site signs with ")
    monkeypatch.setenv("FEDTUNE_VAULT_PASSPHRASE", "another")
    assert "error[vault.wrong-key]" in empty.run("key", "rotate").err


def test_a_short_passphrase_makes_no_site(empty: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    monkeypatch.setenv("FEDTUNE_VAULT_PASSPHRASE", "short")
    assert "error[vault.weak-passphrase]" in empty.run("init", "mercy").err
    assert not empty.site.exists()


def test_the_commands_are_installed_and_answer_as_a_process(empty: Place) -> None:
    done = run_process("client", "init", "mercy", "--format", "json", cwd=empty.folder)
    assert done.code == 0, done.err
    assert json.loads(done.out)["site"] == "mercy"
    again = run_process("client", "init", "mercy", "--format", "json", cwd=empty.folder)
    assert again.code == 2
    assert json.loads(again.err)["error"]["code"] == "journal.exists"


def test_help_names_every_command_and_the_exit_codes(empty: Place) -> None:
    text = " ".join(empty.done("--help").out.split())
    for word in ("init", "policy", "consent", "budget", "approve", "journal", "key", "vault", "7 the plan would be"):
        assert word in text


def test_a_key_is_read_where_the_option_says(empty: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    empty.done("init", "mercy", "--key-file", str(empty.folder / "vault.key"))
    assert Vault.open(empty.site / "vault", Key(bytes(range(32)))).names()
