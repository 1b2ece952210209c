"""A vault as its site uses it: what is put comes back, to whoever has the key, and to nobody else."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tempfile
import threading
import traceback
from pathlib import Path

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedtune.errors import VaultError
from fedtune_client.vault import (
    Key,
    Passphrase,
    Unlock,
    Vault,
    add_signing_key,
    create_signing_key,
    signing_key,
)
from tests.support.vaults import ITEMS, KEY, OTHER, contents, make_vault, read_export, read_vault

PASSPHRASE = Passphrase("correct horse batterie café")
names = st.sampled_from(["a", "update-1", "update-2", "signing-0001", "0.x_y"])


def refused(code: str, path: Path, unlock: Unlock = KEY) -> VaultError:
    with pytest.raises(VaultError) as caught:
        Vault.open(path, unlock)
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value


class AVaultIsADictionary(RuleBasedStateMachine):
    """Whatever is done to a vault, in any order, it holds what a dictionary would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.key, self.expected = KEY, dict[str, bytes]()
        self.vault = Vault.create(Path(self.root.name) / "vault", self.key)

    @rule(name=names, data=st.binary(max_size=50))
    def put(self, name: str, data: bytes) -> None:
        self.vault.put(name, data)
        self.expected[name] = data

    @rule(name=names)
    def remove(self, name: str) -> None:
        if self.expected.pop(name, None) is None:
            with pytest.raises(VaultError, match=name):
                self.vault.remove(name)
        else:
            self.vault.remove(name)

    @rule(key=st.sampled_from([KEY, OTHER]))
    def rewrap(self, key: Key) -> None:
        self.vault.rewrap(key)
        self.key = key

    @rule()
    def rotate(self) -> None:
        self.vault.rotate()

    @rule()
    def reopen(self) -> None:
        self.vault = Vault.open(self.vault.folder, self.key)

    @rule()
    def export_and_restore(self) -> None:
        path = Path(self.root.name) / "export"
        self.vault.export(path, OTHER)
        shutil.rmtree(self.vault.folder)
        self.vault = Vault.restore(path, OTHER, self.vault.folder, self.key)
        path.unlink()

    @invariant()
    def it_holds_what_the_dictionary_holds(self) -> None:
        assert contents(self.vault) == self.expected
        assert [self.vault.has(name) for name in ("a", "update-2")] == [
            name in self.expected for name in ("a", "update-2")
        ]

    def teardown(self) -> None:
        self.root.cleanup()


TestAVaultIsADictionary = AVaultIsADictionary.TestCase
TestAVaultIsADictionary.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)


def test_a_vault_and_its_export_are_read_by_independent_code_with_a_passphrase(tmp_path: Path) -> None:
    vault = Vault.create(tmp_path / "vault", PASSPHRASE)
    vault.put("update-1", b"noisy")
    vault.export(tmp_path / "export", PASSPHRASE)
    assert read_vault(vault.folder, PASSPHRASE.text) == {"update-1": b"noisy"}
    assert read_export(tmp_path / "export", PASSPHRASE.text) == {"update-1": b"noisy"}
    assert json.loads((vault.folder / "vault.json").read_bytes())["kdf"]["n"] == 2**17
    refused("vault.wrong-key", vault.folder, Passphrase("correct horse batterie cafe"))
    assert contents(Vault.open(vault.folder, Passphrase("correct horse batterie cafe\u0301"))) == {"update-1": b"noisy"}


def test_a_vault_and_its_export_are_read_by_independent_code_with_a_key(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    vault.rotate()
    vault.rewrap(OTHER)
    vault.export(tmp_path / "export", KEY)
    assert read_vault(vault.folder, OTHER.data) == read_export(tmp_path / "export", KEY.data) == ITEMS


def test_nothing_on_disk_shows_an_item(tmp_path: Path) -> None:
    canary = b"canary-of-the-vault"
    vault = make_vault(tmp_path / "vault", items={"update-1": canary * 3})
    vault.rotate()
    vault.export(tmp_path / "export", OTHER)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4  # header, lock, item, export
    for secret in (canary, KEY.data, OTHER.data, vault._opened.data_key, vault._opened.wrapping_key):
        assert not any(secret in file or secret.hex().encode() in file for file in files)
    assert not any(b"update-1" in file for file in files)


def test_every_bit_and_every_prefix_of_the_header_is_guarded(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault", items={})
    path = vault.folder / "vault.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        refused("vault.damaged", vault.folder)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused("vault.damaged", vault.folder)
    path.write_bytes(whole)
    assert Vault.open(vault.folder, KEY).names() == ()


def test_every_bit_and_every_prefix_of_an_item_is_guarded(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault", items={"update-1": b"noisy"})
    path = vault.folder / "items-000001" / "update-1.sealed"
    whole = path.read_bytes()
    flips = [whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :] for bit in range(264)]
    for changed in [*flips, *(whole[:length] for length in range(len(whole))), whole + b"\n"]:
        path.write_bytes(changed)
        with pytest.raises(VaultError, match="update-1") as caught:
            vault.get("update-1")
        assert caught.value.code == "vault.damaged"


def test_an_item_under_another_name_or_in_another_vault_does_not_open(tmp_path: Path) -> None:
    vault, other = make_vault(tmp_path / "one"), make_vault(tmp_path / "two")
    items = vault.folder / "items-000001"
    shutil.copy(items / "update-7.sealed", items / "update-8.sealed")
    shutil.copy(items / "empty.sealed", other.folder / "items-000001" / "empty.sealed")
    for where, name in ((vault, "update-8"), (other, "empty")):
        with pytest.raises(VaultError) as caught:
            where.get(name)
        assert caught.value.code == "vault.damaged"
    assert vault.get("update-7") == ITEMS["update-7"]  # the control: the same bytes in their place


def test_an_item_of_an_older_data_key_does_not_open(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    kept = (vault.folder / "items-000001" / "empty.sealed").read_bytes()
    vault.rotate()
    (vault.folder / "items-000002" / "empty.sealed").write_bytes(kept)
    with pytest.raises(VaultError, match="does not open"):
        vault.get("empty")


@pytest.mark.parametrize("unlock", [OTHER, PASSPHRASE])
def test_another_key_opens_nothing(tmp_path: Path, unlock: Unlock) -> None:
    vault = make_vault(tmp_path / "vault")
    refused("vault.wrong-key", vault.folder, unlock)


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    refused("vault.missing", tmp_path / "nowhere")
    refused("vault.missing", tmp_path)
    vault = make_vault(tmp_path / "vault")
    for act in (vault.get, vault.remove):
        with pytest.raises(VaultError, match="holds no update-9") as caught:
            act("update-9")
        assert caught.value.code == "vault.no-item"
    shutil.rmtree(vault.folder / "items-000001")
    refused("vault.damaged", vault.folder)
    shutil.rmtree(vault.folder)
    with pytest.raises(VaultError, match="there is no vault"):
        vault.get("update-7")


@pytest.mark.parametrize("name", ["", ".hidden", "../vault", "a/b", "A", "a\n", "a b", "é", "x" * 129])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path: Path, name: str) -> None:
    vault = make_vault(tmp_path / "vault")
    for act in (vault.get, vault.has, vault.remove, lambda wrong: vault.put(wrong, b"")):
        with pytest.raises(VaultError) as caught:
            act(name)
        assert caught.value.code == "vault.bad-name"
    assert contents(vault) == ITEMS


@pytest.mark.parametrize(
    "change",
    [{"n": 2**30}, {"n": 2**52}, {"n": 2**17 + 1}, {"n": 2}, {"n": -1}, {"r": 2**20}, {"p": 10**6}, {"salt": "00"}],
)
def test_a_hostile_header_cannot_ask_for_memory_or_time(tmp_path: Path, change: dict[str, object]) -> None:
    vault = make_vault(tmp_path / "vault", items={})
    header = json.loads((vault.folder / "vault.json").read_bytes())
    header["kdf"] = {"name": "scrypt", "salt": "00" * 16, "n": 2**17, "r": 8, "p": 1} | change
    write_header(vault.folder, header)
    assert next(iter(change)) in refused("vault.damaged", vault.folder, PASSPHRASE).message


def write_header(folder: Path, header: dict[str, object]) -> None:
    """Write a header with the checksum that belongs to it, as a hostile hand would."""
    header.pop("checksum", None)
    header["checksum"] = hashlib.sha256(rfc8785.dumps(header)).hexdigest()  # type: ignore[arg-type]
    (folder / "vault.json").write_bytes(rfc8785.dumps(header) + b"\n")  # type: ignore[arg-type]


def test_a_header_with_a_checksum_of_its_own_still_cannot_be_changed(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    vault.rotate()
    header = json.loads((vault.folder / "vault.json").read_bytes())
    write_header(vault.folder, dict(header))
    assert contents(Vault.open(vault.folder, KEY)) == ITEMS  # the control
    (vault.folder / "items-000002").rename(vault.folder / "items-000001")
    write_header(vault.folder, header | {"generation": 1})
    refused("vault.wrong-key", vault.folder)
    write_header(vault.folder, header | {"more": 1})
    refused("vault.damaged", vault.folder)
    write_header(vault.folder, header | {"version": 2})
    assert "version 2" in refused("vault.unknown-version", vault.folder).message


def test_a_changed_passphrase_opens_and_the_old_one_does_not_and_no_item_is_touched(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    items = {path: path.stat().st_mtime_ns for path in (vault.folder / "items-000001").iterdir()}
    vault.rewrap(OTHER)
    refused("vault.wrong-key", vault.folder, KEY)
    assert contents(Vault.open(vault.folder, OTHER)) == contents(vault) == ITEMS
    assert {path: path.stat().st_mtime_ns for path in items} == items


@pytest.mark.parametrize("text", ["", "short", "elevenchars", "e\u0301" * 11])
def test_a_new_passphrase_of_fewer_than_twelve_characters_is_refused(tmp_path: Path, text: str) -> None:
    vault, weak = make_vault(tmp_path / "vault"), Passphrase(text)
    vault.export(tmp_path / "export", OTHER)
    for act in (
        lambda: Vault.create(tmp_path / "new", weak),
        lambda: vault.rewrap(weak),
        lambda: vault.export(tmp_path / "weak", weak),
        lambda: Vault.restore(tmp_path / "export", OTHER, tmp_path / "new", weak),
    ):
        with pytest.raises(VaultError, match="at least 12") as caught:
            act()
        assert caught.value.code == "vault.weak-passphrase"
    assert {path.name for path in tmp_path.iterdir()} == {"vault", "export"}
    assert contents(Vault.open(vault.folder, KEY)) == ITEMS


def test_another_handle_follows_a_rotation(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    other = Vault.open(vault.folder, KEY)
    vault.rotate()
    assert contents(other) == ITEMS
    other.put("update-8", b"later")
    assert (vault.get("update-8"), vault.generation, other.generation) == (b"later", 2, 2)


def test_another_handle_does_not_bring_an_old_passphrase_back(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    other = Vault.open(vault.folder, KEY)
    vault.rewrap(OTHER)
    for act in (other.rotate, other.names, lambda: other.rewrap(KEY)):
        with pytest.raises(VaultError) as caught:
            act()
        assert caught.value.code == "vault.changed"
    assert contents(Vault.open(vault.folder, OTHER)) == ITEMS


def test_writers_and_a_rotation_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    make_vault(tmp_path / "vault", items={})
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            vault = Vault.open(tmp_path / "vault", KEY)
            for turn in range(12):
                vault.put(f"update-{number}-{turn}", bytes([number, turn]))
                if turn % 4 == number:
                    vault.rotate()
                assert vault.get(f"update-{number}-0") == bytes([number, 0])
        except Exception as error:  # noqa: BLE001 - a thread's failure is this test's
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    expected = {f"update-{number}-{turn}": bytes([number, turn]) for number in range(3) for turn in range(12)}
    assert contents(Vault.open(tmp_path / "vault", KEY)) == expected


def test_signing_keys_are_numbered_and_the_newest_is_in_force(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault", items={"update-1": b""})
    with pytest.raises(VaultError, match="no signing key"):
        signing_key(vault)
    with pytest.raises(VaultError, match="no signing key"):
        add_signing_key(vault)
    made = [create_signing_key(vault), add_signing_key(vault), add_signing_key(vault)]
    assert vault.names() == ("signing-0001", "signing-0002", "signing-0003", "update-1")
    assert public(signing_key(Vault.open(vault.folder, KEY))) == public(made[-1])
    assert [public(signing_key(vault, public(key))) for key in made] == [public(key) for key in made]
    assert len({public(key) for key in made}) == 3
    with pytest.raises(VaultError, match="does not hold the key"):
        signing_key(vault, "00" * 32)


def test_a_second_first_key_is_refused(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault", items={})
    key = create_signing_key(vault)
    with pytest.raises(VaultError) as caught:
        create_signing_key(vault)
    assert caught.value.code == "vault.exists"
    assert public(signing_key(vault)) == public(key)


def test_signing_keys_are_ordered_as_numbers(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault", items={f"signing-{n}": bytes([n % 251]) * 32 for n in (9999, 10000)})
    add_signing_key(vault)
    assert "signing-10001" in vault.names()


def test_an_item_that_is_no_key_is_said_to_be_damaged(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault", items={"signing-0001": b"short"})
    with pytest.raises(VaultError, match="not an Ed25519 key"):
        signing_key(vault)


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def test_no_error_shows_what_was_given(tmp_path: Path) -> None:
    vault = Vault.create(tmp_path / "vault", PASSPHRASE)
    vault.put("update-1", b"canary of an item")
    wrong, weak = Passphrase("canary of a passphrase"), Passphrase("canary")
    (vault.folder / "items-000001" / "update-1.sealed").write_bytes(b"x")
    for act in (
        lambda: Vault.open(vault.folder, wrong),
        lambda: Vault.open(vault.folder, KEY),
        lambda: vault.rewrap(weak),
        lambda: vault.get("update-1"),
        lambda: vault.put("update-1", b"canary", replace=False),
    ):
        with pytest.raises(VaultError) as caught:
            act()
        shown = "".join(traceback.format_exception(caught.value)) + caught.value.hint
        assert shown.count("canary") == shown.count('b"canary"')  # this test's own line
        assert KEY.data.hex() not in shown


def test_an_open_vault_shows_no_key_and_is_not_pickled(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    shown = f"{vault!r} {vault} {vault._opened!r} {KEY!r} {PASSPHRASE!r}"
    for secret in (KEY.data, vault._opened.data_key, vault._opened.wrapping_key, PASSPHRASE.text.encode()):
        assert repr(secret) not in shown
        assert secret.hex() not in shown
        assert secret.decode("latin-1") not in shown
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(vault)
