"""What unlocks a vault: the first that is given, read from a place that is this user's alone, and never shown."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import VaultError
from fedtune_client.vault import Key, Passphrase, Unlock, unlock_from

A, B, C = Key(b"a" * 32), Key(b"b" * 32), Key(b"c" * 32)
TYPED = "typed at the prompt"


def key_file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refused(code: str, environment: Mapping[str, str], path: Path | None = None) -> VaultError:
    with pytest.raises(VaultError) as caught:
        unlock_from(environment, key_file=path)
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value


def test_the_first_that_is_given_is_taken(tmp_path: Path) -> None:
    given = {
        "option": key_file(tmp_path / "a", A.data),
        "FEDTUNE_VAULT_KEY_FILE": str(key_file(tmp_path / "b", B.data)),
        "FEDTUNE_VAULT_KEY": C.data.hex(),
        "FEDTUNE_VAULT_PASSPHRASE": "from the environment",
    }
    expected: list[Unlock] = [A, B, C, Passphrase("from the environment"), Passphrase(TYPED)]
    for first in range(5):
        left = dict(list(given.items())[first:])
        option = left.pop("option", None)
        assert unlock_from(left, key_file=option, ask=lambda: TYPED) == expected[first]  # type: ignore[arg-type]


def test_nobody_is_asked_when_something_is_given() -> None:
    asked: list[str] = []
    assert unlock_from({"FEDTUNE_VAULT_KEY": A.data.hex()}, ask=lambda: asked.append("") or TYPED) == A  # type: ignore[func-returns-value]
    assert asked == []


@pytest.mark.parametrize("environment", [{}, {"FEDTUNE_VAULT_KEY": "", "FEDTUNE_VAULT_KEY_FILE": ""}])
def test_without_any_the_vault_stays_locked_and_every_way_is_named(environment: dict[str, str]) -> None:
    error = refused("vault.locked", environment)
    for way in ("FEDTUNE_VAULT_KEY_FILE", "FEDTUNE_VAULT_KEY", "FEDTUNE_VAULT_PASSPHRASE", "key file", "terminal"):
        assert way in error.hint
    with pytest.raises(VaultError, match="locked"):
        unlock_from(environment, ask=lambda: "")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("spell", [bytes.hex, lambda key: key.hex().upper()])
def test_a_key_file_may_be_written_in_hexadecimal_digits(tmp_path: Path, spell: object, end: bytes) -> None:
    key = bytes(range(150, 182))
    path = key_file(tmp_path / "key", spell(key).encode() + end)  # type: ignore[operator]
    assert unlock_from({}, key_file=path) == Key(key)


@given(key=st.binary(min_size=32, max_size=32))
def test_any_32_bytes_are_a_key(tmp_path_factory: pytest.TempPathFactory, key: bytes) -> None:
    path = key_file(tmp_path_factory.mktemp("key") / "key", key)
    assert unlock_from({"FEDTUNE_VAULT_KEY_FILE": str(path)}) == Key(key)


def test_a_key_may_come_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(A.data,))
    writer.start()
    assert unlock_from({}, key_file=tmp_path / "pipe") == A
    writer.join()


SECRET = "5ec2e7" * 10


@pytest.mark.parametrize("content", ["", SECRET, SECRET + "5ec", SECRET + "5ec2ff", "zz" + SECRET + "zz", SECRET * 9])
def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path, content: str) -> None:
    errors = [refused("vault.bad-key", {}, key_file(tmp_path / "key", content.encode()))]
    if content:
        errors.append(refused("vault.bad-key", {"FEDTUNE_VAULT_KEY": content}))
    for error in errors:
        assert "5ec2" not in f"{error} {error!r} {error.hint} {error.__cause__!r}"


def test_a_key_of_another_length_cannot_be_made() -> None:
    for length in (0, 16, 31, 33):
        with pytest.raises(VaultError, match=f"{length} bytes, not 32"):
            Key(bytes(length))


def test_a_passphrase_that_is_no_text_is_refused_without_showing_it() -> None:
    environment = {"FEDTUNE_VAULT_PASSPHRASE": os.fsdecode(b"5ec2 \xff\xfe 5ec2")}
    error = refused("vault.bad-passphrase", environment)
    assert "5ec2" not in f"{error!r} {error.hint} {error.__cause__!r} {error.__context__!r}"


def test_a_key_file_that_is_not_there_says_how_one_is_made(tmp_path: Path) -> None:
    assert "umask 077" in refused("vault.no-key-file", {}, tmp_path / "nowhere").hint
    refused("vault.unreadable", {}, tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o604, 0o602, 0o660, 0o644, 0o666, 0o610, 0o601, 0o777])
def test_a_key_file_open_to_others_is_refused_with_what_closes_it(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path / "my key", A.data, mode)
    error = refused("vault.permissions", {"FEDTUNE_VAULT_KEY_FILE": str(path)})
    assert error.hint == f"chmod go-rwx '{path}'"
    assert os.system(error.hint) == 0
    assert unlock_from({"FEDTUNE_VAULT_KEY_FILE": str(path)}) == A


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_file_of_its_owner_alone_is_taken(tmp_path: Path, mode: int) -> None:
    assert unlock_from({}, key_file=key_file(tmp_path / "key", A.data, mode)) == A


def test_a_key_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path / "key", A.data)
    if os.geteuid() == 0:
        os.chown(path, 4243, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4243)
    error = refused("vault.permissions", {}, path)
    assert error.hint.startswith("chown ")
    assert "belongs to another user" in error.message
