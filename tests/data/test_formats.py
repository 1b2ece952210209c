import csv
import gzip
import json
from pathlib import Path
from typing import TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.data.formats import column_names, read_table
from fedtune.errors import DataError

ROWS = [
    {"text": "I lost my card", "label": "lost_card"},
    {"text": 'He said "no, never"\nand left', "label": "phishing"},
    {"text": "Grüße, 日本, 🏦", "label": "change_address"},
]
EVERY_FORMAT = [
    "a.csv",
    "a.tsv",
    "a.json",
    "a.arrays.json",
    "a.jsonl",
    "a.ndjson",
    "a.parquet",
    "a.arrow",
    "a.stream.arrow",
    "a-saved",
    "a.csv.gz",
    "a.tsv.gz",
    "a.json.gz",
    "a.jsonl.gz",
]
cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1, max_size=12)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows by the standard writer of the format that the name shows."""
    name = path.name.removesuffix(".gz")
    arrow = pa.Table.from_pylist(rows)
    if name.endswith("saved"):
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif name.endswith(".parquet"):
        pq.write_table(arrow, path)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink:
            new = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
            with new(sink, arrow.schema) as writer:
                writer.write_table(arrow)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as stream:
            write_text(stream, name, rows)


def write_text(stream: TextIO, name: str, rows: list[dict[str, str]]) -> None:
    if name.endswith("arrays.json"):
        json.dump({key: [row[key] for row in rows] for key in rows[0]}, stream)
    elif name.endswith(".json"):
        json.dump(rows, stream, indent=1)
    elif name.endswith(("jsonl", "ndjson")):
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if ".tsv" in name else ",")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_the_same_records_are_read_from_every_format(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    table = read_table(str(tmp_path / name))
    assert table.columns == {key: tuple(row[key] for row in ROWS) for key in ("text", "label")}
    assert table.rows == 3


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_only_the_named_columns_and_the_first_rows_are_kept(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    table = read_table(str(tmp_path / name), columns=["label"], limit=2)
    assert table.columns == {"label": ("lost_card", "phishing")}
    assert table.rows == 2


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_the_column_names_of_every_format_are_known_without_reading_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROWS)
    assert column_names(str(tmp_path / name)) == ("text", "label")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({"text": cell, "label": cell}), min_size=1, max_size=8))
def test_any_text_survives_a_trip_through_a_text_format(tmp_path: Path, name: str, rows: list[dict[str, str]]) -> None:
    write(tmp_path / name, rows)
    assert read_table(str(tmp_path / name)).columns == {
        key: tuple(row[key] for row in rows) for key in ("text", "label")
    }


def test_each_row_knows_the_line_on_which_it_starts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",x\n\nthree,y\n', "utf-8")
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n{"text": "two"}\n', "utf-8")
    (tmp_path / "a.json").write_text('[\n {"text": "one [",\n  "label": "x"},\n\n {"text": "two"}]\n', "utf-8")
    assert read_table(str(tmp_path / "a.csv")).lines == (2, 5)
    assert read_table(str(tmp_path / "a.jsonl")).lines == (2, 4)
    assert read_table(str(tmp_path / "a.json")).lines == (2, 5)
    assert read_table(str(tmp_path / "a.csv")).place(1) == f"{tmp_path / 'a.csv'}, line 5"


def test_a_byte_order_mark_is_no_part_of_the_first_column_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\r\nhello,x\r\n")
    assert read_table(str(tmp_path / "a.csv")).columns == {"text": ("hello",), "label": ("x",)}


def test_a_field_longer_than_the_csv_modules_limit_is_read(tmp_path: Path) -> None:
    note = "long note " * 50_000
    (tmp_path / "a.csv").write_text(f"text,label\n{note},x\n", "utf-8")
    before = csv.field_size_limit(1000)
    try:
        assert read_table(str(tmp_path / "a.csv")).columns["text"] == (note,)
        assert csv.field_size_limit() == 1000  # the caller's own limit is back in place
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("kind", ["saved", "parquet", "arrow"])
def test_class_numbers_of_a_data_set_become_class_names(tmp_path: Path, kind: str) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    held = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    path = tmp_path / f"a.{kind}"
    if kind == "saved":
        path = tmp_path / "a"
        held.save_to_disk(path)
    elif kind == "parquet":
        held.to_parquet(path)
    else:
        held.save_to_disk(tmp_path / "a")
        (tmp_path / "a" / "data-00000-of-00001.arrow").rename(path)
    assert read_table(str(path)).columns["label"] == ("yes", "no", None)


def test_a_saved_data_set_keeps_its_shuffled_order(tmp_path: Path) -> None:
    shuffled = datasets.Dataset.from_dict({"text": [str(at) for at in range(50)]}).shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "a")
    assert read_table(str(tmp_path / "a")).columns["text"] == tuple(shuffled["text"])


def test_a_said_format_wins_over_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\tlabel\nhello, you\tx\n", "utf-8")
    assert read_table(str(tmp_path / "a.txt"), "tsv").columns["text"] == ("hello, you",)


def test_the_hub_is_not_asked_unless_allowed() -> None:
    with pytest.raises(DataError) as caught:
        read_table("someone/something", "hub")
    assert caught.value.code == "data.download-not-allowed"
    assert "allow_download" in caught.value.hint


def test_a_hub_id_may_name_a_revision_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, revision, split))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "other": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("someone/notes", "someone/notes@v1:validation"):
        assert read_table(name, "hub", columns=["text"], allow_download=True).columns == {"text": ("a", "b")}
    assert asked == [("someone/notes", None, "train"), ("someone/notes", "v1", "validation")]


def test_what_is_no_hub_id_is_never_asked_for() -> None:
    with pytest.raises(DataError) as caught:
        read_table("../secret file", "hub", allow_download=True)
    assert caught.value.code == "data.bad-hub-id"


def test_a_limit_stops_reading_before_a_later_broken_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n', "utf-8")
    assert read_table(str(tmp_path / "a.jsonl"), limit=1).columns == {"text": ("one",)}
