"""An export's bytes: a header line, then the items as numbered sealed records, then a record that says it is the end.

A record that is missing, added or out of its place does not open, and one item at a time is in memory. Knows no vault.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidTag

from fedtune.errors import VaultError
from fedtune_client.vault import header as headers
from fedtune_client.vault.files import disk_errors
from fedtune_client.vault.header import MOST_HEADER_BYTES, Header, Opened, damaged
from fedtune_client.vault.sealing import context, seal, unseal
from fedtune_client.vault.unlock import Unlock

LABEL = "fedtune vault export v1"
_RECORD = "fedtune vault export item v1"
_ITEM, _END = b"item\n", b"end\n"
_LENGTH_BYTES = 8


def sealed_export(unlock: Unlock, items: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """Yield the bytes of an export of named items. Error: `vault.weak-passphrase`, before the first byte."""
    export = headers.new(unlock, LABEL)
    yield export.header.to_bytes()
    index = 0
    for index, (name, data) in enumerate(items, start=1):
        yield from _record(export, index - 1, _ITEM + name.encode() + b"\n" + data)
    yield from _record(export, index, _END)


@contextmanager
def opened_export(path: Path, unlock: Unlock) -> Iterator[Iterator[tuple[str, bytes]]]:
    """Open an export and give its items one after another; only after the last of them is it known to be whole.

    Errors: `vault.missing`, `vault.wrong-key`, `vault.damaged`.
    """
    with disk_errors(path, "read"):
        if not path.exists():
            raise VaultError("missing", f"there is no export {path}", hint=f"ls {path.parent}")
        file = path.open("rb")
    with file:
        where = f"the export {path}"
        header = Header.from_bytes(_read(file, path, MOST_HEADER_BYTES, line=True), where)
        yield _records(file, path, headers.opened(header, unlock, LABEL, where))


def _records(file: BinaryIO, path: Path, export: Opened) -> Iterator[tuple[str, bytes]]:
    size, index = os.fstat(file.fileno()).st_size, 0
    while True:
        length = int.from_bytes(_read(file, path, _LENGTH_BYTES), "big")
        sealed = _read(file, path, min(length, size))  # a length that was changed asks for no more than there is
        if len(sealed) != length:
            raise damaged(f"the export {path}", f"record {index} is cut short")
        try:
            text = unseal(export.data_key, sealed, _bound_to(export, index))
        except InvalidTag as error:
            raise damaged(f"the export {path}", f"record {index} does not open") from error
        if text == _END:
            break
        name, _, data = text.removeprefix(_ITEM).partition(b"\n")
        yield name.decode(), data
        index += 1
    if _read(file, path, 1):
        raise damaged(f"the export {path}", "something follows its end")


def _record(export: Opened, index: int, text: bytes) -> Iterator[bytes]:
    sealed = seal(export.data_key, text, _bound_to(export, index))
    yield len(sealed).to_bytes(_LENGTH_BYTES, "big")
    yield sealed


def _bound_to(export: Opened, index: int) -> bytes:
    return context(_RECORD, export.header.id, str(index))


def _read(file: BinaryIO, path: Path, size: int, *, line: bool = False) -> bytes:
    with disk_errors(path, "read"):
        return file.readline(size) if line else file.read(size)
