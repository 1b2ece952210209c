"""Where a vault's files are in its folder, and what in that folder is not the vault's. Opens nothing."""

from __future__ import annotations

import re
from pathlib import Path

from fedtune.errors import VaultError
from fedtune_client.vault.files import check_private, disk_errors, read_private
from fedtune_client.vault.header import MOST_HEADER_BYTES, Header, damaged

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")  # one case only: some file systems know no other
_SUFFIX = ".sealed"


def header_file(folder: Path) -> Path:
    """Return where the wrapped data key is."""
    return folder / "vault.json"


def lock_file(folder: Path) -> Path:
    """Return what writers and readers lock."""
    return folder / "lock"


def items_folder(folder: Path, header: Header) -> Path:
    """Return where the items of the generation in force are."""
    return folder / f"items-{header.generation:06d}"


def item_file(folder: Path, header: Header, name: str) -> Path:
    """Return where an item is. Error: `vault.bad-name`."""
    if not _NAME.fullmatch(name):
        hint = "use at most 128 lower-case letters, digits, dots, dashes and underscores"
        raise VaultError("bad-name", f"an item cannot be called {name[:40]!r}", hint=hint)
    return items_folder(folder, header) / f"{name}{_SUFFIX}"


def item_names(folder: Path, header: Header) -> tuple[str, ...]:
    """Return the names of all items, sorted."""
    items = items_folder(folder, header)
    with disk_errors(items, "read"):
        found = (path.name.removesuffix(_SUFFIX) for path in items.iterdir() if path.name.endswith(_SUFFIX))
        return tuple(sorted(name for name in found if _NAME.fullmatch(name)))


def read_header(folder: Path) -> Header:
    """Read the header on disk. Errors: `vault.missing`, `vault.damaged`, `vault.permissions`."""
    with disk_errors(folder, "read"):
        if not folder.is_dir() or not header_file(folder).exists():
            raise VaultError("missing", f"there is no vault in {folder}", hint="make one: fedtune client init")
        check_private(folder, folder.stat())
    raw = read_private(header_file(folder), most=MOST_HEADER_BYTES) or b""
    return Header.from_bytes(raw, f"the vault's header {header_file(folder)}")


def check_items(folder: Path, header: Header) -> None:
    """Refuse a vault whose items' folder is gone, or open to others."""
    items = items_folder(folder, header)
    with disk_errors(items, "read"):
        if not items.is_dir():
            raise damaged(f"the vault {folder}", f"its folder {items.name} is gone")
        check_private(items, items.stat())


def leftovers(folder: Path, header: Header) -> list[Path]:
    """Return what a process that was killed has left: other generations, and files that were not finished."""
    items = items_folder(folder, header)
    others = (path for path in folder.glob("items-*") if path != items)
    return [*others, *folder.glob(".*.partial"), *items.glob(".*.partial")]


def refuse_used(folder: Path) -> None:
    """Refuse to make a vault where anything is already: `vault.exists`."""
    with disk_errors(folder, "read"):
        found = sorted(path.name for path in folder.iterdir() if path != lock_file(folder))
    if header_file(folder).name in found:
        raise VaultError("exists", f"there is a vault in {folder} already", hint="open it, or choose another folder")
    if found:
        message = f"{folder} holds other things ({', '.join(found[:3])})"
        raise VaultError("exists", message, hint="choose another folder, or look at what is there and remove it")
