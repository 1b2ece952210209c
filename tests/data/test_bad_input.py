"""Every bad file gives one error with its code, its place and a next step."""

import gzip
from pathlib import Path

import datasets
import pytest

from fedtune.config.schema import DataSettings
from fedtune.data.check import check
from fedtune.data.formats import read_table
from fedtune.errors import DataError

FILES: dict[str, tuple[str, bytes, str, str]] = {
    "an empty CSV": ("a.csv", b"", "data.empty-file", "a.csv"),
    "a CSV of a header only": ("a.csv", b"text,label\n", "data.empty-file", "a.csv"),
    "an empty JSONL": ("a.jsonl", b"\n\n", "data.empty-file", "a.jsonl"),
    "an empty JSON": ("a.json", b"", "data.empty-file", "a.json"),
    "an empty JSON array": ("a.json", b"[]", "data.empty-file", "a.json"),
    "a broken JSONL line": ("a.jsonl", b'{"text": "a"}\n\n{"text": b}\n', "data.broken-json", "line 3"),
    "a JSONL line that is no object": ("a.jsonl", b'{"text": "a"}\n[1]\n', "data.broken-json", "line 2"),
    "a JSONL line cut in the middle": ("a.jsonl", b'{"text": "a"}\n{"text": "b', "data.broken-json", "line 2"),
    "a broken JSON": ("a.json", b'[{"text": "a"},\n{"text": }]', "data.broken-json", "line 2"),
    "a JSON array with a number": ("a.json", b'[{"text": "a"}, 3]', "data.broken-json", "int"),
    "JSON arrays of unequal length": ("a.json", b'{"text": ["a"], "label": []}', "data.json-shape", "a.json"),
    "a JSON value": ("a.json", b'"hello"', "data.json-shape", "a.json"),
    "endless JSON nesting": ("a.jsonl", b"[" * 200_000 + b"\n", "data.broken-json", "line 1"),
    "a CSV row too short": ("a.csv", b"text,label\na,x\nb\n", "data.broken-row", "line 3: 1 fields, the header has 2"),
    "a CSV row too long": ("a.csv", b"text,label\na,b,x\n", "data.broken-row", "line 2: 3 fields"),
    "a CSV quote never closed": ("a.csv", b'text,label\na,x\n"b,y\nc,z\n', "data.broken-row", "line 3"),
    "a duplicate header": ("a.csv", b"text,text\na,x\n", "data.duplicate-header", "'text'"),
    "a blank header": ("a.csv", b"text,\na,x\n", "data.blank-header", "column 2"),
    "Latin-1": ("a.csv", b"text,label\ncaf\xe9,x\n", "data.not-utf8", "line 2: byte 0xe9 at offset 14"),
    "UTF-16": ("a.csv", "text,label\n".encode("utf-16"), "data.not-utf8", "line 1: byte 0xff at offset 0"),
    "Latin-1 after a mark": ("a.csv", b"\xef\xbb\xbft\xe9,x\n", "data.not-utf8", "offset 4"),
    "gzip that is not": ("a.csv.gz", b"text,label\n", "data.broken-gzip", "a.csv.gz"),
    "gzip cut short": ("a.csv.gz", gzip.compress(b"text,label\na,x\n" * 99)[:40], "data.broken-gzip", "a.csv.gz"),
    "Parquet that is not": ("a.parquet", b"text,label\na,x\n", "data.not-parquet", "a.parquet"),
    "an empty Parquet": ("a.parquet", b"", "data.not-parquet", "a.parquet"),
    "Arrow that is not": ("a.arrow", b"text,label\na,x\n", "data.not-arrow", "a.arrow"),
    "an unknown ending": ("a.xlsx", b"PK", "data.unknown-format", "a.xlsx"),
    "one class only": ("a.csv", b"text,label\na,x\nb,x\n", "data.one-class", "'x'"),
    "a blank text": ("a.csv", b"text,label\na,x\n  ,y\n", "data.blank-value", "line 3: column 'text'"),
    "a blank label": ("a.csv", b"text,label\na,x\nb,\n", "data.blank-value", "line 3: column 'label'"),
    "a null text": (
        "a.jsonl",
        b'{"text": null, "label": "x"}\n{"text": "b", "label": "y"}',
        "data.blank-value",
        "line 1",
    ),
    "a missing key": ("a.jsonl", b'{"text": "a", "label": "x"}\n{"label": "y"}', "data.blank-value", "line 2"),
    "a number as text": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": 5, "label": "y"}',
        "data.mixed-types",
        "line 2",
    ),
    "mixed labels": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "label": 5}',
        "data.mixed-types",
        "line 2",
    ),
    "a list as label": ("a.jsonl", b'{"text": "a", "label": ["x"]}', "data.mixed-types", "line 1"),
    "unrecognised columns": ("a.csv", b"one,two\na,x\n", "data.no-task", "one, two"),
    "two tasks at once": ("a.csv", b"text,label,prompt,completion\na,x,b,c\n", "data.ambiguous-task", "prompt"),
    "two label columns": ("a.csv", b"text,category,intent\na,x,y\n", "data.ambiguous-task", "category, intent"),
    "messages without an assistant": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "data.bad-messages",
        "line 1",
    ),
    "a message of an unknown role": (
        "a.jsonl",
        b'{"messages": [{"role": "wizard", "content": "a"}]}',
        "data.bad-messages",
        "'wizard'",
    ),
    "a message without content": (
        "a.jsonl",
        b'{"messages": [{"role": "assistant", "content": null}]}',
        "data.bad-messages",
        "'assistant'",
    ),
    "messages that are text": ("a.jsonl", b'{"messages": "hello"}', "data.mixed-types", "line 1"),
    "messages that are words": ("a.jsonl", b'{"messages": ["hello"]}', "data.bad-messages", "line 1"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_named_with_its_place_and_a_next_step(tmp_path: Path, case: str) -> None:
    name, content, code, place = FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        check(str(tmp_path / name), DataSettings())
    assert caught.value.code == code
    assert place in caught.value.message
    assert name in caught.value.message or code in {"data.no-task", "data.ambiguous-task"}
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_table(str(tmp_path / "none.csv"))
    assert caught.value.code == "data.missing-file"
    assert "none.csv" in caught.value.message


def test_a_folder_without_a_data_set_suggests_a_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n", "utf-8")
    with pytest.raises(DataError) as caught:
        read_table(str(tmp_path))
    assert caught.value.code == "data.is-a-folder"
    assert "a.csv" in caught.value.hint


def test_a_saved_folder_of_splits_suggests_one_of_them(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "a")
    with pytest.raises(DataError) as caught:
        read_table(str(tmp_path / "a"))
    assert caught.value.code == "data.several-splits"
    assert read_table(caught.value.hint.partition("=")[2]).rows == 2


def test_a_broken_saved_folder_is_no_traceback(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "a")
    (tmp_path / "a" / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        read_table(str(tmp_path / "a"))
    assert caught.value.code == "data.not-arrow"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "a"])
def test_a_missing_column_names_the_nearest_and_lists_all(tmp_path: Path, name: str) -> None:
    held = datasets.Dataset.from_dict({"Text": ["a"], "label": ["x"]})
    writers = {
        "a.csv": held.to_csv,
        "a.jsonl": held.to_json,
        "a.json": lambda path: held.to_json(path, lines=False),
        "a.parquet": held.to_parquet,
        "a": held.save_to_disk,
    }
    writers[name](tmp_path / name)
    with pytest.raises(DataError) as caught:
        read_table(str(tmp_path / name), columns=["txt"])
    assert caught.value.code == "data.missing-column"
    assert "Text, label" in caught.value.message
    assert "'Text'" in caught.value.hint


def test_a_file_in_the_place_of_the_wrong_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError) as caught:
        read_table(str(tmp_path / "a.json"))
    assert caught.value.code == "data.broken-json"
    assert "line 2" in caught.value.message
