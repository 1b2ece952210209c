"""Whatever the disk, another user or a kill does to a vault: what it held is there, and the error says what to do."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import VaultError
from fedtune_client.vault import Key, Vault
from fedtune_client.vault.transfer import opened_export
from tests.support.vaults import ITEMS, KEY, OTHER, contents, make_vault

CHANGED = ITEMS | {"update-7": b"new" * 100}
LESS = {name: data for name, data in ITEMS.items() if name != "empty"}
ACTS: dict[str, tuple[Callable[[Vault], None], dict[str, bytes]]] = {
    "put": (lambda vault: vault.put("update-7", b"new" * 100), CHANGED),
    "remove": (lambda vault: vault.remove("empty"), LESS),
    "rewrap": (lambda vault: vault.rewrap(OTHER), ITEMS),
    "rotate": (lambda vault: vault.rotate(), ITEMS),
}
CALLS = ("open", "mkdir", "fsync", "replace", "unlink", "rmdir")


def open_with_either(folder: Path) -> Vault:
    try:
        return Vault.open(folder, KEY)
    except VaultError as error:
        assert error.code == "vault.wrong-key"  # noqa: PT017 - any other failure is one
        return Vault.open(folder, OTHER)


def fail_at(monkeypatch: pytest.MonkeyPatch, moment: int, number: int) -> list[str]:
    """Let the system refuse the call of that number, counted over all calls that change something; return the calls."""
    made: list[str] = []
    for name in CALLS:
        monkeypatch.setattr(os, name, refusing(getattr(os, name), name, made, moment, number))
    return made


def refusing(real: Callable[..., Any], name: str, made: list[str], moment: int, number: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        made.append(name)
        if len(made) == moment:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "vault.disk-full"), (errno.EIO, "vault.unwritable")])
@pytest.mark.parametrize("act", ACTS)
def test_whatever_call_the_system_refuses_the_vault_holds_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, number: int, code: str
) -> None:
    do, wanted = ACTS[act]
    refusals = 0
    for moment in count(1):
        vault = make_vault(tmp_path / str(moment))
        with monkeypatch.context() as patched:
            made = fail_at(patched, moment, number)
            try:
                do(vault)
            except VaultError as error:
                assert (error.code, bool(error.hint)) == (code, True)  # noqa: PT017 - some moments refuse, some do not
                refusals += 1
        held = contents(vault)
        assert held in (ITEMS, wanted)
        again = open_with_either(vault.folder)
        assert contents(again) == held
        again.rotate()
        assert contents(again) == held
        assert len(list(vault.folder.iterdir())) == 3
        if len(made) < moment:
            break
    assert refusals >= 4
    assert held == wanted


KILLER = """
import os, shutil, signal, stat, sys
from itertools import count
from pathlib import Path
from fedtune_client.vault import Vault
from tests.client.test_vault_failures import ACTS, CALLS
from tests.support.vaults import KEY

def kill_at(moment):
    made = []
    def killing(real, name):
        def call(*arguments, **options):
            made.append(name)
            if len(made) == moment:
                if name == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
                    os.ftruncate(arguments[0], 7)  # what was not flushed may be there in part
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for name in CALLS:
        setattr(os, name, killing(getattr(os, name), name))

root, act = Path(sys.argv[1]), sys.argv[2]
for moment in count(1):
    folder = root / str(moment)
    shutil.copytree(root / "start", folder)
    child = os.fork()
    if child == 0:
        vault = Vault.open(folder, KEY)
        kill_at(moment)
        ACTS[act][0](vault)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""


@pytest.mark.parametrize("act", ACTS)
def test_whenever_a_process_is_killed_the_vault_holds_the_old_or_the_new(tmp_path: Path, act: str) -> None:
    make_vault(tmp_path / "start")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), act], capture_output=True, text=True, check=True
    )
    moments = int(done.stdout)
    assert moments > 4
    wanted = ACTS[act][1]
    for moment in range(1, moments + 1):
        vault = open_with_either(tmp_path / str(moment))
        assert contents(vault) in (ITEMS, wanted)
        assert {path.name for path in vault.folder.iterdir()} == {
            "vault.json",
            "lock",
            f"items-{vault.generation:06d}",
        }
        vault.rotate()
        assert contents(vault) in (ITEMS, wanted)
    assert contents(vault) == wanted


def test_a_vault_that_could_not_be_made_is_made_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_vault(tmp_path / "start").export(tmp_path / "export", OTHER)
    refusals = 0
    for moment in count(1):
        folder = tmp_path / str(moment)
        with monkeypatch.context() as patched:
            made = fail_at(patched, moment, errno.ENOSPC)
            try:
                vault = Vault.restore(tmp_path / "export", OTHER, folder, KEY)
            except VaultError as error:
                assert error.code == "vault.disk-full"  # noqa: PT017 - some moments refuse, some do not
                refusals += 1
                vault = None
        vault = vault or Vault.restore(tmp_path / "export", OTHER, folder, KEY)
        assert contents(vault) == contents(Vault.open(folder, KEY)) == ITEMS
        if len(made) < moment:
            break
    assert refusals > 15


def test_nothing_is_ever_open_to_others_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    real_open, real_mkdir = os.open, os.mkdir

    def watched_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        descriptor = real_open(path, flags, *rest, **options)
        if flags & os.O_CREAT:
            seen[Path(path).name] = stat.S_IMODE(os.fstat(descriptor).st_mode)
        return descriptor

    def watched_mkdir(path: Any, *rest: Any, **options: Any) -> None:
        real_mkdir(path, *rest, **options)
        seen[Path(path).name + "/"] = stat.S_IMODE(Path(path).stat().st_mode)

    before = os.umask(0)
    try:
        monkeypatch.setattr(os, "open", watched_open)
        monkeypatch.setattr(os, "mkdir", watched_mkdir)
        vault = make_vault(tmp_path / "vault")
        vault.rotate()
        vault.export(tmp_path / "export", OTHER)
        (tmp_path / "control").write_bytes(b"")
    finally:
        os.umask(before)
    assert len(seen) >= 10
    assert {name: mode for name, mode in seen.items() if mode != (0o700 if name.endswith("/") else 0o600)} == {}
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert found.pop("control") == 0o666
    assert set(found.values()) == {0o600, 0o700}


@pytest.mark.parametrize("part", [".", "vault.json", "items-000001"])
@pytest.mark.parametrize("mode", [0o040, 0o020, 0o010, 0o004, 0o002, 0o001])
def test_a_vault_open_to_others_is_refused_with_what_closes_it(tmp_path: Path, part: str, mode: int) -> None:
    vault = make_vault(tmp_path / "vault")
    path = vault.folder / part
    path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)
    for act in (lambda: Vault.open(vault.folder, KEY), lambda: vault.get("empty"), lambda: vault.put("empty", b"x")):
        with pytest.raises(VaultError, match="open to group or others") as caught:
            act()
        assert caught.value.code == "vault.permissions"
    assert os.system(caught.value.hint) == 0
    assert contents(Vault.open(vault.folder, KEY)) == ITEMS


def test_an_item_open_to_others_is_refused(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    (vault.folder / "items-000001" / "empty.sealed").chmod(0o640)
    with pytest.raises(VaultError, match=r"empty\.sealed is open to group or others"):
        vault.get("empty")


@pytest.mark.parametrize("part", [".", "vault.json", "items-000001"])
def test_a_vault_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    vault = make_vault(tmp_path / "vault")
    if os.geteuid() == 0:
        os.chown(vault.folder / part, 4243, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4243)
    with pytest.raises(VaultError, match="belongs to another user") as caught:
        Vault.open(vault.folder, KEY)
    assert caught.value.code == "vault.permissions"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_vault_on_a_disk_that_cannot_be_written_is_read_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A leftover of a killed rotation is there too, and stays."""
    vault = make_vault(tmp_path / "vault")
    (vault.folder / "items-000002").mkdir()
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and vault.folder in Path(path).parents:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    found = Vault.open(vault.folder, KEY)
    assert contents(found) == ITEMS
    found.export(tmp_path / "export", OTHER)
    for act in (found.rotate, lambda: found.put("new", b""), lambda: found.remove("empty")):
        with pytest.raises(VaultError, match="cannot be written") as caught:
            act()
        assert caught.value.code == "vault.unwritable"
        assert "ls -ld" in caught.value.hint
    assert contents(Vault.restore(tmp_path / "export", OTHER, tmp_path / "restored", KEY)) == ITEMS


def test_nothing_is_made_where_something_is(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    vault.export(tmp_path / "export", OTHER)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "mine" / "letter").write_text("keep")
    for act in (
        lambda: Vault.create(vault.folder, KEY),
        lambda: Vault.create(tmp_path / "mine", KEY),
        lambda: Vault.restore(tmp_path / "export", OTHER, vault.folder, OTHER),
        lambda: vault.export(tmp_path / "export", OTHER),
        lambda: vault.put("empty", b"x", replace=False),
    ):
        with pytest.raises(VaultError) as caught:
            act()
        assert caught.value.code == "vault.exists"
        assert caught.value.hint
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter"]
    assert contents(Vault.open(vault.folder, KEY)) == ITEMS


def test_a_damaged_item_stops_a_rotation_and_an_export_and_nothing_else(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    (vault.folder / "items-000001" / "empty.sealed").write_bytes(b"x" * 40)
    for act in (vault.rotate, lambda: vault.export(tmp_path / "export", OTHER)):
        with pytest.raises(VaultError, match=r"the item empty .* is damaged"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["vault"]
    assert vault.get("update-7") == ITEMS["update-7"]
    vault.remove("empty")
    vault.rotate()
    assert contents(vault) == LESS


def items_of(path: Path, unlock: Key = OTHER) -> dict[str, bytes]:
    with opened_export(path, unlock) as items:
        return dict(items)


def test_an_export_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "export"
    make_vault(tmp_path / "vault", items={"a": b"x", "b": b"yy"}).export(path, OTHER)
    export = path.read_bytes()
    assert items_of(path) == {"a": b"x", "b": b"yy"}  # the control
    head = export.index(b"\n") + 1
    a, b, end = export[head : head + 44], export[head + 44 : head + 89], export[head + 89 :]
    assert [part[:8] for part in (a, b, end)] == [length.to_bytes(8, "big") for length in (36, 37, 32)]
    swapped, dropped, doubled = (export[:head] + rest for rest in (b + a + end, a + end, a + a + b + end))
    cut = [export[:length] for length in range(len(export))]
    flips = [
        export[:at] + bytes([export[at] ^ 1 << bit]) + export[at + 1 :] for at in range(len(export)) for bit in range(8)
    ]
    for changed in (swapped, dropped, doubled, export + b"\0", *cut, *flips):
        path.write_bytes(changed)
        with pytest.raises(VaultError) as caught:
            items_of(path)
        assert caught.value.code == "vault.damaged"


def test_what_an_earlier_rotation_left_is_no_item_of_the_next(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    shutil.copytree(vault.folder / "items-000001", vault.folder / "items-000002")
    vault.remove("empty")
    vault.rotate()
    assert contents(vault) == LESS


def test_an_export_that_is_not_whole_restores_nothing(tmp_path: Path) -> None:
    path = tmp_path / "export"
    make_vault(tmp_path / "vault").export(path, OTHER)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VaultError, match="cut short"):
        Vault.restore(path, OTHER, tmp_path / "restored", KEY)
    assert [found.name for found in (tmp_path / "restored").iterdir()] == ["lock"]


def test_an_export_opens_with_its_own_key_alone(tmp_path: Path) -> None:
    vault = make_vault(tmp_path / "vault")
    vault.export(tmp_path / "export", OTHER)
    for path in (tmp_path / "export", vault.folder / "vault.json"):  # a vault's header is not an export's
        with pytest.raises(VaultError, match="not sealed with this key") as caught:
            Vault.restore(path, KEY, tmp_path / "new", KEY)
        assert caught.value.code == "vault.wrong-key"
    with pytest.raises(VaultError, match="there is no export"):
        Vault.restore(tmp_path / "nowhere", KEY, tmp_path / "new", KEY)
    assert not (tmp_path / "new").exists()


def test_what_is_renamed_into_place_is_on_disk_before_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = make_vault(tmp_path / "vault")
    with monkeypatch.context() as patched:
        made = fail_at(patched, 0, errno.EIO)
        vault.put("update-7", b"new")
    assert made == ["open", "open", "fsync", "replace", "open", "fsync"]  # lock, file, folder
