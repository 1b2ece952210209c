from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.object_store.object_store import NoObjectInStoreError, ObjectStore
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from fedtune.flower.object_files import LARGE, ObjectFiles
from tests.support.link_state import new_database

Make = Callable[[type[SqlObjectStore]], SqlObjectStore]


def thing(size: int, letter: bytes = b"x", children: tuple[str, ...] = ()) -> tuple[str, bytes]:
    """Return an object as Flower writes one: kind, children, length, a zero byte, body."""
    content = f"ArrayChunk {','.join(children)} {size}".encode() + b"\0" + letter * size
    return get_object_id(content), content


SMALL, BIG, OTHER = thing(10), thing(LARGE), thing(2 * LARGE, b"y")
ROOT = thing(1, children=(BIG[0], SMALL[0]))
SECOND = thing(2, children=(BIG[0],))


def tree(root: str, *children: str) -> ObjectTree:
    return ObjectTree(object_id=root, children=[ObjectTree(object_id=child) for child in children])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(kind: type[SqlObjectStore]) -> SqlObjectStore:
        path = tmp_path / "link.db"
        if not path.exists():
            path.write_bytes(new_database())
        store = kind(str(path))
        store.initialize()
        return store

    return made


@pytest.fixture
def store(make: Make) -> ObjectFiles:
    made = make(ObjectFiles)
    assert isinstance(made, ObjectFiles)
    return made


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "link.db.objects").iterdir()}


def story(store: ObjectStore) -> list[object]:
    """Return what a store answers to everything that happens to two messages that share a large object."""
    heard: list[object] = [store.preregister(1, tree(ROOT[0], BIG[0], SMALL[0])), store.get(BIG[0])]
    for name, content in (BIG, SMALL, ROOT, BIG):
        store.put(name, content)
    heard += [store.preregister(1, tree(SECOND[0], BIG[0])), store.preregister(2, tree(OTHER[0]))]
    heard += [store.get(name) for name, _ in (BIG, SMALL, ROOT, SECOND, OTHER)]
    store.delete(ROOT[0])
    heard += [len(store), BIG[0] in store, SMALL[0] in store, store.get(BIG[0]), store.get_object_tree(SECOND[0])]
    store.delete(BIG[0])  # still a child
    heard += [len(store)]
    store.delete_objects_in_run(1)
    heard += [len(store), store.get(BIG[0]), OTHER[0] in store]
    store.clear()
    return [*heard, len(store)]


def test_it_answers_as_flowers_own_store_does(make: Make) -> None:
    assert story(make(ObjectFiles)) == story(make(SqlObjectStore))


def test_a_large_object_is_a_file_while_it_is_there_and_a_small_one_never(store: ObjectFiles, tmp_path: Path) -> None:
    store.preregister(1, tree(ROOT[0], BIG[0], SMALL[0]))
    for name, content in (BIG, SMALL, ROOT):
        store.put(name, content)
    assert files(tmp_path) == {BIG[0]}
    store.delete(ROOT[0])
    assert files(tmp_path) == set()


@pytest.mark.parametrize(("name", "content"), [(BIG[0], OTHER[1]), thing(LARGE, b"z")])
def test_what_is_not_registered_or_has_another_hash_leaves_no_file(
    store: ObjectFiles, tmp_path: Path, name: str, content: bytes
) -> None:
    store.preregister(1, tree(BIG[0]))
    with pytest.raises((ValueError, NoObjectInStoreError)):
        store.put(name, content)
    assert files(tmp_path) == set()
    assert store.get(BIG[0]) == b""


def test_bytes_without_flowers_form_are_refused(store: ObjectFiles) -> None:
    content = b"no head" * LARGE
    store.preregister(1, tree(get_object_id(content)))
    with pytest.raises(Exception, match="unexpected structure"):
        store.put(get_object_id(content), content)


@pytest.mark.parametrize("left", [None, b"", BIG[1][:-1]])
def test_a_file_that_a_crash_has_taken_is_an_object_that_is_not_there(
    store: ObjectFiles, tmp_path: Path, left: bytes | None
) -> None:
    store.preregister(1, tree(BIG[0]))
    store.put(*BIG)
    path = tmp_path / "link.db.objects" / BIG[0]
    path.unlink() if left is None else path.write_bytes(left)
    assert store.get(BIG[0]) is None
    store.delete(BIG[0])
    assert len(store) == 0


def test_a_full_disk_leaves_the_object_to_be_sent_again(
    store: ObjectFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    store.preregister(1, tree(BIG[0]))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            store.put(*BIG)
    assert store.get(BIG[0]) == b""
    store.put(*BIG)
    assert store.get(BIG[0]) == BIG[1]


def test_files_of_no_object_are_swept_and_others_kept(store: ObjectFiles, tmp_path: Path) -> None:
    store.preregister(1, tree(BIG[0]))
    store.put(*BIG)
    (tmp_path / "link.db.objects" / OTHER[0]).write_bytes(b"a transaction that was not committed")
    (tmp_path / "link.db.objects" / f"{OTHER[0]}.partial").write_bytes(b"cut off")
    assert store.sweep() == 2
    assert files(tmp_path) == {BIG[0]}


def test_objects_that_flowers_store_has_kept_in_the_database_are_still_there(make: Make) -> None:
    old = make(SqlObjectStore)
    old.preregister(1, tree(BIG[0]))
    old.put(*BIG)
    new = make(ObjectFiles)
    assert new.get(BIG[0]) == BIG[1]
    new.delete(BIG[0])
    assert len(old) == 0
