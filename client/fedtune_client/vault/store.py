"""The vault: named items in a folder, each sealed under the vault's data key (format: the package's docstring).

Every change is one file that is replaced whole, and the header is written last, so a kill at any moment leaves what was
before or what was wanted. Several processes may have a vault open: a lock orders them, and each follows what the others
did. Knows nothing of what an item holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from cryptography.exceptions import InvalidTag

from fedtune.errors import VaultError
from fedtune.run.files import sync_folder
from fedtune_client.vault import header as headers
from fedtune_client.vault.files import (
    disk_errors,
    locked,
    make_private_folder,
    read_private,
    remove_file,
    write_private,
)
from fedtune_client.vault.header import Opened, damaged
from fedtune_client.vault.layout import (
    check_items,
    header_file,
    item_file,
    item_names,
    items_folder,
    leftovers,
    lock_file,
    read_header,
    refuse_used,
)
from fedtune_client.vault.sealing import context, seal, unseal
from fedtune_client.vault.transfer import opened_export, sealed_export
from fedtune_client.vault.unlock import Unlock

LABEL = "fedtune vault v1"
_ITEM = "fedtune vault item v1"


class Vault:
    """An open vault; its methods raise `vault.*` errors, and an item is as it was when they do."""

    __slots__ = ("_opened", "folder")

    def __init__(self, folder: Path, opened: Opened) -> None:
        self.folder = folder
        self._opened = opened

    def __repr__(self) -> str:
        return f"Vault({str(self.folder)!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a vault holds keys and is not pickled: open it where it is used")

    @classmethod
    def create(cls, folder: Path, unlock: Unlock) -> Vault:
        """Make an empty vault. Errors: `vault.exists`, `vault.weak-passphrase`, `vault.permissions`."""
        return cls._made(folder, unlock, ())

    @classmethod
    def restore(cls, export: Path, unlock_of_export: Unlock, folder: Path, unlock: Unlock) -> Vault:
        """Make a vault, with keys of its own, of an export's items. Errors: as `create` and `opened_export`."""
        with opened_export(export, unlock_of_export) as items:
            return cls._made(folder, unlock, items)

    @classmethod
    def open(cls, folder: Path, unlock: Unlock) -> Vault:
        """Open a vault, and drop what a process that was killed has left in it.

        Errors: `vault.missing`, `vault.wrong-key`, `vault.damaged`, `vault.permissions`, `vault.unknown-version`.
        """
        vault = cls(folder, headers.opened(read_header(folder), unlock, LABEL, f"the vault {folder}"))
        with vault._reading():
            pass
        if leftovers(folder, vault._opened.header):
            with suppress(VaultError), vault._writing():  # a disk that cannot be written can still be read
                vault._sweep()
        return vault

    @property
    def id(self) -> str:
        """What tells this vault from others."""
        return self._opened.header.id

    @property
    def generation(self) -> int:
        """How many data keys this vault has had, as this process last saw it."""
        return self._opened.header.generation

    def put(self, name: str, data: bytes, *, replace: bool = True) -> None:
        """Keep an item, on disk when this returns; one of that name is replaced whole, or refused: `vault.exists`."""
        with self._writing() as opened:
            path = item_file(self.folder, opened.header, name)
            if not replace and path.exists():
                raise VaultError("exists", f"the vault {self.folder} already holds {name}", hint="choose another name")
            write_private(path, [_sealed(opened, name, data)])

    def get(self, name: str) -> bytes:
        """Return an item. Errors: `vault.no-item`, `vault.damaged`."""
        with self._reading() as opened:
            return self._get(opened, name)

    def has(self, name: str) -> bool:
        """Whether there is an item of this name."""
        with self._reading() as opened:
            return item_file(self.folder, opened.header, name).exists()

    def remove(self, name: str) -> None:
        """Remove an item. Error: `vault.no-item`."""
        with self._writing() as opened:
            path = item_file(self.folder, opened.header, name)
            if not path.exists():
                raise self._no_item(name)
            remove_file(path)

    def names(self) -> tuple[str, ...]:
        """Return the names of all items, sorted."""
        with self._reading() as opened:
            return item_names(self.folder, opened.header)

    def rewrap(self, unlock: Unlock) -> None:
        """Change the passphrase or the key; no item is touched.

        A copy of the old header still opens with the old passphrase, so `rotate` too if that has become known.
        """
        with self._writing() as opened:
            self._write_header(headers.rewrapped(opened, unlock, LABEL))

    def rotate(self) -> None:
        """Seal every item again under a new data key; the old key opens nothing that is in the vault afterwards.

        The new items are written beside the old ones, and after them the header, which names the generation in force.
        """
        with self._writing() as old:
            self._sweep()
            new = headers.rotated(old, LABEL)
            try:
                _write_items(self.folder, new, self._all(old))
            except BaseException:
                with suppress(VaultError):
                    self._sweep()
                raise
            self._write_header(new)  # if this fails both generations stay: the header on disk decides at the next open
            with suppress(VaultError):  # the next open tries again
                self._sweep()

    def export(self, path: Path, unlock: Unlock) -> None:
        """Write all items into one sealed file with a passphrase or key of its own. Error: `vault.exists`."""
        with self._reading() as opened:
            if path.exists():
                raise VaultError("exists", f"{path} is there already", hint="export to another path")
            write_private(path, sealed_export(unlock, self._all(opened)))

    @classmethod
    def _made(cls, folder: Path, unlock: Unlock, items: Iterable[tuple[str, bytes]]) -> Vault:
        opened = headers.new(unlock, LABEL)
        make_private_folder(folder)
        refuse_used(folder)
        vault = cls(folder, opened)
        with locked(lock_file(folder), alone=True):
            refuse_used(folder)  # another process may have made one meanwhile
            try:
                _write_items(folder, opened, items)
                vault._write_header(opened)
            except BaseException:
                with suppress(OSError):
                    header_file(folder).unlink(missing_ok=True)
                shutil.rmtree(items_folder(folder, opened.header), ignore_errors=True)
                raise
        return vault

    @contextmanager
    def _reading(self) -> Iterator[Opened]:
        read_header(self.folder)  # a vault that is gone is missing; its lock would only be unwritable
        with locked(lock_file(self.folder), alone=False), disk_errors(self.folder, "read"):
            yield self._followed()

    @contextmanager
    def _writing(self) -> Iterator[Opened]:
        read_header(self.folder)
        with locked(lock_file(self.folder), alone=True), disk_errors(self.folder):
            yield self._followed()

    def _followed(self) -> Opened:
        """Return the keys in force, which another process may have rotated since; asked under the lock."""
        header = read_header(self.folder)
        if header != self._opened.header:
            found = headers.unwrap(header, self._opened.wrapping_key, LABEL)
            if found is None:
                message = f"the passphrase or key of {self.folder} was changed by another process"
                raise VaultError("changed", message, hint="start again with the new one")
            self._opened = found
        check_items(self.folder, header)
        return self._opened

    def _all(self, opened: Opened) -> Iterator[tuple[str, bytes]]:
        return ((name, self._get(opened, name)) for name in item_names(self.folder, opened.header))

    def _get(self, opened: Opened, name: str) -> bytes:
        sealed = read_private(item_file(self.folder, opened.header, name))
        if sealed is None:
            raise self._no_item(name)
        try:
            return unseal(opened.data_key, sealed, context(_ITEM, opened.header.id, name))
        except InvalidTag as error:
            raise damaged(f"the item {name} of the vault {self.folder}", "it does not open") from error

    def _write_header(self, opened: Opened) -> None:
        try:
            write_private(header_file(self.folder), [opened.header.to_bytes()])
        finally:  # a disk that fails after the rename has the new header all the same
            with suppress(VaultError):
                self._opened = opened if read_header(self.folder) == opened.header else self._opened

    def _sweep(self) -> None:
        """Remove what belongs to no item in force; the header decides, once it is on disk for good."""
        with disk_errors(self.folder):
            sync_folder(self.folder)
            for path in leftovers(self.folder, self._followed().header):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _no_item(self, name: str) -> VaultError:
        hint = "restore it from an export or a backup"
        return VaultError("no-item", f"the vault {self.folder} holds no {name}", hint=hint)


def _write_items(folder: Path, opened: Opened, items: Iterable[tuple[str, bytes]]) -> None:
    make_private_folder(items_folder(folder, opened.header))
    for name, data in items:
        write_private(item_file(folder, opened.header, name), [_sealed(opened, name, data)])


def _sealed(opened: Opened, name: str, data: bytes) -> bytes:
    return seal(opened.data_key, data, context(_ITEM, opened.header.id, name))
