"""Who owns which records: units by the cells of a column."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.units import Units, units_of
from fedtune.errors import DataError

OWNERS = st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40)


@given(owners=OWNERS)
def test_each_unit_holds_all_records_of_one_owner_and_no_other(owners: list[str]) -> None:
    units = Units.grouped(owners)
    held = [units.records(unit).tolist() for unit in range(units.count)]
    expected = [[at for at, owner in enumerate(owners) if owner == name] for name in sorted(set(owners))]
    assert held == expected
    assert units.sizes.tolist() == [len(records) for records in expected]
    assert all(units.records_of(np.array([unit])).tolist() == expected[unit] for unit in range(units.count))


@given(owners=OWNERS, data=st.data())
def test_records_that_are_taken_stay_together_as_before(owners: list[str], data: st.DataObject) -> None:
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(owners) - 1)))), dtype=np.int64)
    taken = Units.grouped(owners).take(chosen)
    assert taken.of_record.tolist() == Units.grouped([owners[at] for at in chosen]).of_record.tolist()


@given(records=st.integers(0, 30))
def test_a_record_is_a_unit_of_its_own_unless_a_column_is_named(records: int) -> None:
    units = Units.each_record(records)
    assert units.of_record.tolist() == list(range(records))
    assert (units.count, units.noun) == (records, "records")


@given(rows=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", "z"])), min_size=1, max_size=40))
def test_a_unit_counts_for_its_most_frequent_label(rows: list[tuple[str, str]]) -> None:
    owners, labels = zip(*rows, strict=True)
    found = Units.grouped(owners).most_frequent(labels)
    for owner, label in zip(sorted(set(owners)), found, strict=True):
        counts = Counter(given for name, given in rows if name == owner)
        assert label == min(name for name, count in counts.items() if count == max(counts.values()))


@pytest.mark.parametrize(
    ("cells", "units"),
    [
        (["p1", " p1", "p1 ", "p2"], [0, 0, 0, 1]),
        ([7, 7.0, 8], [0, 0, 1]),
        (["Jos\u00e9", "Jose\u0301", "Jose"], [1, 1, 0]),
        ([True, False, True], [1, 0, 1]),
    ],
)
def test_cells_that_look_alike_are_one_unit(make_table: Any, cells: list[object], units: list[int]) -> None:
    assert units_of(make_table(patient=cells), "patient").of_record.tolist() == units


@pytest.mark.parametrize("cell", [None, "", "  ", float("nan")])
def test_a_blank_cell_is_an_error_that_names_the_line(make_table: Any, cell: object) -> None:
    with pytest.raises(DataError) as caught:
        units_of(make_table(patient=["p1", "p2", cell]), "patient")
    assert caught.value.code == "data.blank-value"
    assert "bank.csv, line 4: column 'patient' is empty" in caught.value.message


def test_cells_of_two_types_are_an_error_that_does_not_tell_whose_record_it_is(make_table: Any) -> None:
    with pytest.raises(DataError) as caught:
        units_of(make_table(patient=["secret-1", 4711]), "patient")
    assert caught.value.code == "data.mixed-types"
    assert "line 3" in caught.value.message
    assert not [word for word in ("secret-1", "4711") if word in caught.value.message + caught.value.hint]


def test_a_column_that_is_not_there_is_named_with_its_neighbour(make_table: Any) -> None:
    with pytest.raises(DataError, match="no column 'patientid'") as caught:
        units_of(make_table(patient_id=["a"]), "patientid")
    assert "patient_id" in caught.value.hint
