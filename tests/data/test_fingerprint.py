import csv
import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.fingerprint import fingerprint
from fedtune.data.formats import read_table
from fedtune.data.table import Table

row = st.fixed_dictionaries({"text": st.text(max_size=6), "label": st.sampled_from(["a", "b"])})


def table_of(rows: list[dict[str, str]]) -> Table:
    return Table({name: tuple(row[name] for row in rows) for name in ("text", "label")}, len(rows), "x", "csv")


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=6), data=st.data())
def test_the_order_of_rows_and_columns_does_not_matter(rows: list[dict[str, str]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    assert fingerprint(table_of(rows), ["text", "label"]) == fingerprint(table_of(shuffled), ["label", "text"])


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=6), other=st.lists(row, min_size=1, max_size=6))
def test_two_fingerprints_are_equal_exactly_when_the_records_are(
    rows: list[dict[str, str]], other: list[dict[str, str]]
) -> None:
    def records(of: list[dict[str, str]]) -> list[tuple[str, str]]:
        return sorted((row["text"], row["label"]) for row in of)

    same = fingerprint(table_of(rows), ["text", "label"]) == fingerprint(table_of(other), ["text", "label"])
    assert same is (records(rows) == records(other))


def test_a_repeated_record_counts() -> None:
    one = [{"text": "t", "label": "a"}]
    assert fingerprint(table_of(one), ["text"]) != fingerprint(table_of(one * 2), ["text"])


def test_values_do_not_run_into_each_other(make_table: Any) -> None:
    one, two = make_table(a=["xy"], b=["z"]), make_table(a=["x"], b=["yz"])
    assert fingerprint(one, ["a", "b"]) != fingerprint(two, ["a", "b"])


def test_a_column_that_is_not_used_does_not_matter(make_table: Any) -> None:
    one, two = make_table(text=["t"], id=[1]), make_table(text=["t"], id=[2])
    assert fingerprint(one, ["text"]) == fingerprint(two, ["text"])


def test_the_name_and_the_format_of_the_file_do_not_matter(tmp_path: Path) -> None:
    rows = [{"text": "Grüße", "label": "a"}, {"text": "two\nlines", "label": "b"}]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with (tmp_path / "two.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["label", "text"])
        writer.writeheader()
        writer.writerows(reversed(rows))
    prints = {fingerprint(read_table(str(path)), ["text", "label"]) for path in tmp_path.iterdir()}
    assert len(prints) == 1
    assert len(prints.pop()) == 64
