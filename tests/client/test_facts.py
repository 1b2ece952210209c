"""`site.yaml`: the site's own mapping from names to files."""

from __future__ import annotations

import array
import fcntl
import os
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.errors import ConfigError, ConsentError, DataError
from fedtune_client.facts import changed_since, open_table, read_facts, stamp
from fedtune_client.policy.reading import read_policy
from fedtune_client.policy.schema import Policy

SITE = """
name: north-clinic
data:
  claims: {path: claims.csv}
  notes.2026:
    path: /somewhere/notes.txt
    format: jsonl
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "site.yaml").write_text(SITE, "utf-8")
    (tmp_path / "claims.csv").write_text("text,label,unused\nhello,a,1\nthere,b,2\n", "utf-8")
    return tmp_path


def test_names_lead_to_files_relative_to_the_sites_folder(folder: Path) -> None:
    facts = read_facts(folder)
    assert (facts.name, list(facts.data)) == ("north-clinic", ["claims", "notes.2026"])
    assert (facts.find("claims").path, facts.find("claims").format) == (folder / "claims.csv", "auto")
    assert (facts.find("notes.2026").path, facts.find("notes.2026").format) == (Path("/somewhere/notes.txt"), "jsonl")


def test_a_site_may_have_no_data_yet(tmp_path: Path) -> None:
    for text in ("name: s", "name: s\ndata:\n", "name: s\ndata: {}"):
        (tmp_path / "site.yaml").write_text(text, "utf-8")
        assert not read_facts(tmp_path).data


@pytest.mark.parametrize(
    "name", ["claim", "../claims.csv", "claims.csv", "/etc/passwd", "", "data.claims", "x" * 10_000]
)
def test_a_name_in_a_plan_never_becomes_a_path(folder: Path, name: str) -> None:
    with pytest.raises(ConsentError) as caught:
        open_table(read_facts(folder), name)
    assert caught.value.code == "consent.unknown-data"
    assert len(caught.value.message) < 500
    assert "site.yaml" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("", "missing-value", "name must be given"),
        ("name: [a]", "bad-value", "name"),
        ("name: a b", "bad-value", "line 1"),
        ("name: s\ndata: 7", "unknown-key", "data"),
        ("name: s\nnmae: t", "unknown-key", "did you mean name?"),
        ("name: s\ndata:\n  x: {pth: a.csv}", "unknown-key", "did you mean data.x.path?"),
        ("name: s\ndata:\n  x: {path: a.csv, formt: csv}", "unknown-key", "did you mean data.x.format?"),
        ("name: s\ndata:\n  x: {path: a.csv, format: hub}", "bad-value", "allowed is auto, csv"),
        ("name: s\ndata:\n  x: {format: csv}", "missing-value", "data.x.path must be given"),
        ("name: s\ndata:\n  x: {path: }", "bad-value", "data.x.path"),
        ("name: s\ndata:\n  x: a.csv", "unknown-key", "data.x"),
        ("name: s\ndata:\n  'a/b': {path: a.csv}", "unknown-key", "data.a/b.path"),
        ("name: s\nname: t", "bad-yaml", "given twice"),
        ("name: !!python/name:os.system s", "bad-yaml", "refused"),
        ("name: s\n_target_: os.system", "unknown-key", "_target_"),
        ("name: 's", "bad-yaml", "line"),
        ("- name", "bad-yaml", "mapping"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_place(tmp_path: Path, text: str, code: str, said: str) -> None:
    (tmp_path / "site.yaml").write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        read_facts(tmp_path)
    assert caught.value.code == f"config.{code}"
    assert said in caught.value.message + caught.value.hint
    assert "site.yaml" in caught.value.message
    assert caught.value.hint


def test_a_folder_that_is_no_sites_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_facts(tmp_path)
    assert caught.value.code == "config.file-missing"
    assert "fedtune client init" in caught.value.hint


def test_all_columns_are_read_also_those_that_no_task_uses(folder: Path) -> None:
    opened = open_table(read_facts(folder), "claims")
    assert opened.table.names == ("text", "label", "unused")
    assert opened.table.rows == 2


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


def rewritten(file: Path) -> None:
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"hello", b"hullo"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def extended(file: Path) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write("more,a,3\n")


@pytest.mark.parametrize("act", [replaced, rewritten, extended, Path.unlink])
def test_a_running_site_notices_that_a_file_is_not_the_one_it_read(folder: Path, act: Callable[[Path], Any]) -> None:
    facts = read_facts(folder)
    opened = open_table(facts, "claims")
    assert not changed_since(facts, "claims", opened.stamp)
    act(folder / "claims.csv")
    assert changed_since(facts, "claims", opened.stamp)


def test_a_saved_folder_changes_with_each_of_its_files(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(folder / "saved"))
    (folder / "site.yaml").write_text("name: s\ndata: {saved: {path: saved}}", "utf-8")
    facts = read_facts(folder)
    opened = open_table(facts, "saved")
    assert opened.table.rows == 2
    assert not changed_since(facts, "saved", opened.stamp)
    (folder / "saved" / "extra.arrow").touch()
    assert changed_since(facts, "saved", opened.stamp)


def test_a_file_that_is_written_to_while_it_is_read_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune_client import facts as module

    read = module.read_table

    def slow(path: str, fmt: str) -> Any:
        table = read(path, fmt)
        extended(Path(path))
        return table

    monkeypatch.setattr(module, "read_table", slow)
    with pytest.raises(DataError) as caught:
        open_table(read_facts(folder), "claims")
    assert caught.value.code == "data.changed"


def test_a_file_that_is_gone_is_named_with_the_key_to_correct(folder: Path) -> None:
    (folder / "claims.csv").unlink()
    with pytest.raises(DataError) as caught:
        open_table(read_facts(folder), "claims")
    assert caught.value.code == "data.missing-file"
    assert "data.claims.path" in caught.value.hint


_opened: list[str] | None = None
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | Path) else "")


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Note every file that Python opens meanwhile; the hook itself can never be taken away again."""
    global _opened, _watching  # noqa: PLW0603 - an audit hook has no other way to be switched off
    if not _watching:
        sys.addaudithook(_watch)
        _watching = True
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def test_looking_facts_and_policy_up_opens_no_data_file_and_reading_the_table_does(folder: Path) -> None:
    (folder / "policy.yaml").write_text(Policy.strict_example(), "utf-8")
    with opened_files() as files:
        facts = read_facts(folder)
        read_policy(folder / "policy.yaml")
        found = stamp(facts, "claims")
        assert not changed_since(facts, "claims", found)
        with pytest.raises(ConsentError):
            facts.find("other")
    assert {str(folder / "site.yaml"), str(folder / "policy.yaml")} <= set(files)
    assert str(folder / "claims.csv") not in files
    with opened_files() as files:
        open_table(facts, "claims")
    assert str(folder / "claims.csv") in files


def waiting_bytes(descriptor: int) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


def test_not_even_a_library_that_opens_files_by_itself_takes_a_byte(folder: Path) -> None:
    """A pipe in a Parquet file's place still holds all that was put in, and does not hang who reads facts."""
    (folder / "site.yaml").write_text("name: s\ndata: {pipe: {path: p.parquet}, real: {path: r.parquet}}", "utf-8")
    os.mkfifo(folder / "p.parquet")
    pq.write_table(pa.table({"text": ["one"]}), folder / "r.parquet")
    pipe = os.open(folder / "p.parquet", os.O_RDWR)
    try:
        os.write(pipe, (folder / "r.parquet").read_bytes())
        full = waiting_bytes(pipe)
        facts = read_facts(folder)
        facts.find("pipe")
        with pytest.raises(DataError) as caught:
            open_table(facts, "pipe")
        assert caught.value.code == "data.not-a-file"
        assert waiting_bytes(pipe) == full > 0
        os.read(pipe, 1)
        assert waiting_bytes(pipe) == full - 1
    finally:
        os.close(pipe)
    assert open_table(facts, "real").table.rows == 1
