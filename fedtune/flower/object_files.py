"""Flower's object store with the large objects in files beside the database, which then holds only their lengths.

Flower keeps an object's bytes in the row that counts its references, before the count: SQLite reads 5 MiB to see it and
writes them to change it. Dropping an adapter of 500 MB took up to twelve seconds, in one transaction that nobody else
could write beside; the database grew by twice the adapter. A file is written before its row's transaction ends and
removed in the one that removes the row. After a kill in between there is a file too many, which `sweep` finds, or one
too few, which counts as an object that is not there: Flower then says that the message is lost, and it is asked anew.
Knows no message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import object_store_factory
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from fedtune.run.files import make_folder

LARGE: Final = 2**16
_MARK: Final = b"fedtune file "  # no object begins like this: they begin with the name of one of Flower's classes


def prepare() -> None:
    """Make Flower use this store in this process; call it before Flower opens its database."""
    vars(object_store_factory)["SqlObjectStore"] = ObjectFiles


class ObjectFiles(SqlObjectStore):
    """The store of the database at a path, with its files in the folder PATH.objects."""

    def __init__(self, database_path: str, verify: bool = True) -> None:
        super().__init__(database_path, verify=False)
        self._verifies = verify
        self._folder = Path(f"{database_path}.objects")
        make_folder(self._folder)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store a registered object; one whose bytes have another name or another form is a ValueError."""
        if self._verifies:
            if get_object_id(object_content) != object_id:
                raise ValueError("an object's name is not the hash of its content")
            validate_object_content(content=object_content)
        if len(object_content) < LARGE:
            super().put(object_id, object_content)
            return
        with self.session():
            super().put(object_id, _MARK + str(len(object_content)).encode())
            partial = self._file(object_id).with_suffix(".partial")
            partial.write_bytes(object_content)
            partial.replace(self._file(object_id))

    def get(self, object_id: str) -> bytes | None:
        """Return an object's bytes, none where it has not come yet, None where it is not registered or lost."""
        content = super().get(object_id)
        if content is None or not content.startswith(_MARK):
            return content
        try:
            found = self._file(object_id).read_bytes()
        except FileNotFoundError:
            return None
        return found if len(found) == int(content.removeprefix(_MARK)) else None

    def delete(self, object_id: str) -> None:
        """Delete an object that nothing refers to, and its children that nothing else refers to."""
        with self.session():
            super().delete(object_id)
            if object_id not in self:
                self._file(object_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything."""
        with self.session():
            super().clear()
            self.sweep()

    def sweep(self) -> int:
        """Remove files that no object has, and return how many there were."""
        with self.session():
            lost = [file for file in self._folder.iterdir() if file.suffix or file.name not in self]
            for file in lost:
                file.unlink()
        return len(lost)

    def _file(self, object_id: str) -> Path:
        return self._folder / object_id
