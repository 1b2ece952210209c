"""Which rows take part: each record's own consent, by a column or by a list."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.fingerprint import fingerprint
from fedtune.data.labels import find_labels, label_names
from fedtune.data.opt_in import ByColumn, ByList, allowed_rows
from fedtune.data.population import population
from fedtune.data.records import to_records
from fedtune.data.table import Table
from fedtune.data.tasks import Task
from fedtune.data.units import units_of
from fedtune.errors import ConsentError

YES = ByColumn("consent", ("yes",))


def table_of(**columns: list[Any]) -> Table:
    rows = len(next(iter(columns.values())))
    return Table({name: tuple(values) for name, values in columns.items()}, rows, "bank.csv", "csv")


def the_list(tmp_path: Path, content: str | bytes, listed: Any = "in", column: str = "id") -> ByList:
    file = tmp_path / "ids.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return ByList(column, file, listed)


def rows_of(table: Table, rule: ByColumn | ByList) -> list[int]:
    found = allowed_rows(table, rule).rows
    assert found.dtype == np.int64
    return found.tolist()


@given(cells=st.lists(st.sampled_from(["yes", "no", "", None, "YES ", "y", "ja"]), min_size=1))
def test_exactly_the_records_whose_cell_says_yes_are_used(cells: list[str | None]) -> None:
    expected = [row for row, cell in enumerate(cells) if str(cell).strip().casefold() in {"yes", "ja"}]
    assert rows_of(table_of(consent=cells), ByColumn("consent", ("Yes", " ja"))) == expected


@pytest.mark.parametrize(
    ("cell", "value"),
    [(True, "true"), ("TRUE", "true"), (1, "1"), (1.0, "1"), ("J\u00e1", "Ja\u0301"), ("a  b", "a b")],
)
def test_a_cell_says_yes_in_any_spelling_of_the_value(cell: object, value: str) -> None:
    assert rows_of(table_of(consent=[cell]), ByColumn("consent", (value,))) == [0]


@pytest.mark.parametrize("cell", ["", "  ", None, float("nan"), ["yes"], {"yes": "yes"}, ("yes",), 0, False, "yes?"])
def test_a_cell_that_does_not_say_yes_is_no(cell: object) -> None:
    assert rows_of(table_of(consent=["yes", cell]), YES) == [0]


def test_a_record_without_opt_in_is_out_although_its_patient_has_one_with_it() -> None:
    table = table_of(patient=["a", "a", "b"], consent=["yes", "no", "yes"])
    assert rows_of(table, YES) == [0, 2]
    assert units_of(table.take(rows_of(table, YES)), "patient").sizes.tolist() == [1, 1]


@given(ids=st.lists(st.integers(0, 9), min_size=1), chosen=st.sets(st.integers(0, 12)))
def test_an_opt_in_and_an_opt_out_of_the_same_ids_part_the_records(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], chosen: set[int]
) -> None:
    table = table_of(id=[f"P{i}" for i in ids])
    content = "# who\n" + "".join(f"P{i}\n" for i in sorted(chosen))
    folder = tmp_path_factory.mktemp("list")
    inside, outside = (allowed_rows(table, the_list(folder, content, listed)) for listed in ("in", "out"))
    assert inside.rows.tolist() == [row for row, i in enumerate(ids) if i in chosen]
    assert sorted([*inside.rows.tolist(), *outside.rows.tolist()]) == list(range(len(ids)))
    assert inside.unknown == outside.unknown == len(chosen - set(ids))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("listed", ["in", "out"])
def test_a_list_may_have_comments_repeats_blank_lines_and_any_line_end(
    tmp_path: Path, end: str, mark: bytes, listed: str
) -> None:
    lines = ["P1", "# asked in May", "", "  P2  # by letter", "P1", "P3#x", "\tJose\u0301"]
    table = table_of(id=["P1", "P2", "P3#x", "Jos\u00e9", "P4"])
    found = allowed_rows(table, the_list(tmp_path, mark + end.join(lines).encode(), listed))
    assert found.rows.tolist() == ([0, 1, 2, 3] if listed == "in" else [4])
    assert found.unknown == 0


@pytest.mark.parametrize(
    ("cell", "line"), [("p1", "P1"), ("7", "007"), (7, "7.0"), ("0007", "7"), ("P1", "\uff30\uff11"), ("a b", "a  b")]
)
def test_an_id_that_a_spreadsheet_rewrote_still_opts_out_and_does_not_opt_in(
    tmp_path: Path, cell: object, line: str
) -> None:
    assert rows_of(table_of(id=[cell, "Q"]), the_list(tmp_path, line, "out")) == [1]
    assert rows_of(table_of(id=[cell, "Q"]), the_list(tmp_path, line, "in")) == []


@pytest.mark.parametrize("listed", ["in", "out"])
@pytest.mark.parametrize("cell", ["", None, float("nan"), ["P1"]])
def test_a_record_of_nobody_known_is_out_of_both(tmp_path: Path, listed: str, cell: object) -> None:
    table = table_of(id=[cell, "P1", "P2"])
    assert rows_of(table, the_list(tmp_path, "P1\n", listed)) == ([1] if listed == "in" else [2])


def test_an_opt_in_of_nobody_uses_no_record(tmp_path: Path) -> None:
    assert rows_of(table_of(id=["P1"]), the_list(tmp_path, "", "in")) == []


def test_an_opt_out_list_that_was_cut_to_nothing_does_not_let_everybody_in(tmp_path: Path) -> None:
    for content in ("", "\n \n", b"\xef\xbb\xbf"):
        with pytest.raises(ConsentError) as caught:
            allowed_rows(table_of(id=["P1"]), the_list(tmp_path, content, "out"))
        assert caught.value.code == "consent.empty-list"
    assert rows_of(table_of(id=["P1"]), the_list(tmp_path, "# nobody has opted out", "out")) == [0]


@pytest.mark.parametrize("listed", ["in", "out"])
def test_a_rule_that_cannot_be_read_allows_nobody(tmp_path: Path, listed: Any) -> None:
    table = table_of(id=["SECRET-1"], consent=["yes"])
    rules: dict[str, ByColumn | ByList] = {
        "consent.unreadable-list": ByList("id", tmp_path / "none.txt", listed),
        "consent.missing-column": the_list(tmp_path, "# none\n", listed, column="ids"),
        "consent.no-values": ByColumn("consent", (" ",)),
    }
    for code, rule in rules.items():
        with pytest.raises(ConsentError) as caught:
            allowed_rows(table, rule)
        assert caught.value.code == code
        assert caught.value.hint
        assert "SECRET" not in caught.value.message + caught.value.hint
    for rule in (ByList("id", tmp_path, listed), the_list(tmp_path, "SECRET-1".encode("utf-16"), listed)):
        with pytest.raises(ConsentError) as caught:
            allowed_rows(table, rule)
        assert caught.value.code == "consent.unreadable-list"
        assert "SECRET" not in caught.value.message + caught.value.hint
    with pytest.raises(ConsentError, match="no column 'consnt'") as caught:
        allowed_rows(table, ByColumn("consnt", ("yes",)))
    assert caught.value.hint == "did you mean 'consent'?"


def test_the_hash_is_that_of_the_list_and_of_the_rule_in_a_column(tmp_path: Path) -> None:
    found = allowed_rows(table_of(id=["P1"]), the_list(tmp_path, "P1\n"))
    assert found.source_sha256 == hashlib.sha256(b"P1\n").hexdigest()
    table = table_of(consent=["yes"])
    same = {
        allowed_rows(table, ByColumn("consent", values)).source_sha256 for values in (("Yes", "ja"), ("ja", "yes "))
    }
    assert len(same) == 1
    assert same != {allowed_rows(table, YES).source_sha256}


class Canary:
    """A cell that must not be touched once it is armed."""

    armed = False

    def _touched(self, *_: object) -> NoReturn:
        raise AssertionError("a record without opt-in was read")

    def __getattribute__(self, name: str) -> Any:
        if Canary.armed:
            raise AssertionError(f"a record without opt-in was read: {name}")
        return super().__getattribute__(name)

    __str__ = __repr__ = __eq__ = __hash__ = __bool__ = __len__ = __iter__ = _touched  # type: ignore[assignment]


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Table:
    """Six records; the text, label and patient of those without opt-in must not be touched."""
    monkeypatch.setattr(Canary, "armed", True)
    bird = Canary()
    return table_of(
        id=["P1", "P2", "P3", "P4", "P5", "P6"],
        consent=["yes", "no", "yes", "", "yes", "yes"],
        text=["one", bird, "three", bird, "five", "six"],
        label=["a", bird, "b", bird, "a", "b"],
        patient=["x", bird, "y", bird, "y", "z"],
    )


def later_stages(table: Table) -> list[object]:
    """All that a study does with a table, up to what a tokenizer sees."""
    task = Task("classification", {"text": "text", "label": "label"})
    task = task.with_labels(find_labels(table, task))
    records = to_records(table, task)
    units = units_of(table, "patient")
    return [records, units.count, label_names(table, "label"), fingerprint(table, table.names), table.place(0)]


@pytest.mark.parametrize("by", ["column", "in", "out"])
def test_no_stage_touches_a_record_without_opt_in(canaries: Table, tmp_path: Path, by: str) -> None:
    ids = {"in": "P1\nP3\nP5\nP6\n", "out": "P2\nP4\n"}
    rule = YES if by == "column" else the_list(tmp_path, ids[by], by)
    used = canaries.take(allowed_rows(canaries, rule).rows.tolist())
    records, units, *_ = later_stages(used)
    assert len(records) == 4  # type: ignore[arg-type]
    assert units == 3
    assert len(population(used, "patient", bytes(32)).units) == 3


def test_the_canaries_sing_where_nobody_was_left_out(canaries: Table) -> None:
    with pytest.raises(AssertionError, match="without opt-in"):
        later_stages(canaries)
    with pytest.raises(AssertionError, match="without opt-in"):
        later_stages(canaries.take([0, 1]))
