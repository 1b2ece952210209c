"""Written tables are read back as they were: text to the character, and in JSON every type."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.formats import read_table
from fedtune.data.table import Table
from fedtune.data.writing import encode_table, written_format
from fedtune.errors import FedtuneError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NAMES = ["text", "a label", "said: \"x\", 'y'"]
JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.lists(TEXT, max_size=2)


def table_of(rows: list[list[Any]], fmt: str = "csv") -> Table:
    columns = {name: tuple(row[at] for row in rows) for at, name in enumerate(NAMES)}
    return Table(columns, rows=len(rows), source="source", format=fmt)


def read_back(file: Path, data: bytes) -> Table:
    file.write_bytes(data)
    return read_table(str(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


@given(rows=st.lists(st.lists(TEXT, min_size=3, max_size=3), min_size=1, max_size=4))
def test_text_survives_csv_to_the_character(folder: Path, rows: list[list[str]]) -> None:
    table = table_of(rows)
    assert read_back(folder / "text.csv", encode_table(table, "csv")).columns == table.columns


@given(rows=st.lists(st.lists(JSON, min_size=3, max_size=3), min_size=1, max_size=4))
def test_every_type_of_json_survives_json_lines(folder: Path, rows: list[list[Any]]) -> None:
    found = read_back(folder / "types.jsonl", encode_table(table_of(rows, "json"), "jsonl"))
    assert repr(found.columns) == repr(table_of(rows).columns)


def test_csv_writes_numbers_and_truth_values_as_json_does_and_nothing_as_the_empty_field() -> None:
    assert encode_table(table_of([[7.0, True, None], [0.5, 3, "x"]]), "csv").splitlines()[1:] == [
        b"7,true,",
        b"0.5,3,x",
    ]


def test_a_date_becomes_text_in_both_formats(tmp_path: Path) -> None:
    table = table_of([["a", "b", dt.date(2024, 2, 29)]], "parquet")
    for fmt in ("csv", "jsonl"):
        found = read_back(tmp_path / f"date.{fmt}", encode_table(table, "csv" if fmt == "csv" else "jsonl"))
        assert found.columns[NAMES[2]] == ("2024-02-29",)


@pytest.mark.parametrize(
    ("value", "fmt", "code"),
    [
        (b"bytes", "csv", "data.mixed-types"),
        (b"bytes", "jsonl", "data.mixed-types"),
        ({"image": b"bytes"}, "jsonl", "data.mixed-types"),
        ([{"role": "user"}], "csv", "data.mixed-types"),
        ("half \ud83d", "csv", "data.not-unicode"),
        ("half \ud83d", "jsonl", "data.not-unicode"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_without_telling_it(value: object, fmt: str, code: str) -> None:
    with pytest.raises(FedtuneError) as caught:
        encode_table(table_of([["a", "b", value]], "json"), "csv" if fmt == "csv" else "jsonl")
    assert caught.value.code == code
    assert "half " not in caught.value.message.replace("half of", "")


def test_the_format_is_the_one_that_changes_no_cell() -> None:
    found = {
        fmt: written_format(table_of([["a", "b", "c"]], fmt)) for fmt in ("csv", "tsv", "synthetic", "json", "hub")
    }
    assert found == {"csv": "csv", "tsv": "csv", "synthetic": "csv", "json": "jsonl", "hub": "jsonl"}
