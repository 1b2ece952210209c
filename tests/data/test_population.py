"""Which files are about the same records, whatever is done to the file."""

from __future__ import annotations

import csv
import hmac
import json
import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.formats import read_table
from fedtune.data.population import Population, overlaps, population
from fedtune.data.table import Table
from fedtune.data.units import units_of
from fedtune.errors import DataError

KEY = bytes(range(32))
FOLDER = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
LABEL = "a class name that is longer than twenty characters"

words = st.text(st.characters(codec="utf-8", categories=["L", "N", "Zs"]), max_size=30)
numbers = st.lists(st.integers(0, 10**6), min_size=1, max_size=8, unique=True)


def table_of(**columns: list[Any]) -> Table:
    rows = len(next(iter(columns.values())))
    return Table({name: tuple(values) for name, values in columns.items()}, rows, "x", "csv")


def notes(numbers: list[int], about: str = "The patient's visit of number") -> list[str]:
    return [f"{about} {number}" for number in numbers]


def of(table: Table, unit: str = "record", key: bytes = KEY) -> Population:
    return population(table, unit, key)


@settings(max_examples=150, deadline=None)
@given(
    ids=numbers,
    more=st.lists(st.integers(10**7, 10**8), max_size=8),
    copies=st.integers(1, 5),
    added=st.lists(words, min_size=1),
    data=st.data(),
)
def test_a_file_stays_the_same_whatever_is_done_around_one_of_its_texts(
    ids: list[int], more: list[int], copies: int, added: list[str], data: st.DataObject
) -> None:
    before = table_of(note=notes(ids), label=[LABEL] * len(ids), year=[2020 + i % 2 for i in ids])
    kept = data.draw(st.sampled_from(ids))
    rows = data.draw(st.permutations([kept, *more] * copies))
    text = data.draw(st.sampled_from([str.upper, str.title, lambda note: f"  {note.replace(' ', '   ')}\n"]))
    columns = {"Notiz": [text(note) for note in notes(rows)], "new": [added[i % len(added)] for i in range(len(rows))]}
    after = table_of(**{name: columns[name] for name in data.draw(st.permutations(list(columns)))})
    assert overlaps(of(before), of(after))
    assert overlaps(of(after), of(before))


@settings(max_examples=100, deadline=None)
@given(one=numbers, other=numbers)
def test_files_of_other_records_do_not_overlap(one: list[int], other: list[int]) -> None:
    """Up to a collision of 128 bits."""
    left = of(table_of(note=notes(one, "The first hospital's visit number"), label=[LABEL] * len(one)))
    right = of(table_of(note=notes(other, "The second hospital's visit number"), label=["another label"] * len(other)))
    assert not overlaps(left, right)
    assert not overlaps(right, left)


@settings(max_examples=100, deadline=None)
@given(one=st.sets(st.integers(0, 40), min_size=1), other=st.sets(st.integers(0, 40), min_size=1))
def test_files_overlap_exactly_when_a_record_or_a_person_is_in_both(one: set[int], other: set[int]) -> None:
    def people(ids: set[int], what: str) -> Population:
        return of(table_of(patient=[f"P{i}" for i in sorted(ids)], note=notes(sorted(ids), what)), "patient")

    shared = bool(one & other)
    assert overlaps(people(one, "First visit of patient number"), people(other, "Other visit of patient number")) is (
        shared
    )
    records = [of(table_of(note=notes(sorted(ids)), n=[0] * len(ids))) for ids in (one, other)]
    assert overlaps(*records) is shared


@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=8), data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_file_is_ever_new_because_rows_were_added_or_moved(rows: list[tuple[str, str]], data: st.DataObject) -> None:
    extra = data.draw(st.lists(st.tuples(words, words), max_size=8))
    more = data.draw(st.permutations(rows + extra))
    before, after = (table_of(a=[a for a, _ in held], b=[b for _, b in held]) for held in (rows, more))
    assert overlaps(of(before), of(after))


def test_one_shared_record_among_a_hundred_thousand_is_found() -> None:
    rows = 100_000
    first = table_of(text=notes(list(range(rows))))
    second = of(table_of(text=notes(list(range(rows, 2 * rows)))))
    third = of(table_of(text=notes(list(range(rows - 1, 2 * rows - 1)))))
    assert not overlaps(of(first), second)
    assert overlaps(of(first), third)


def test_a_copy_with_each_row_many_times_is_the_same_file() -> None:
    once, thrice = notes([1, 2, 3]), notes([1, 2, 3]) * 3
    assert overlaps(of(table_of(text=once)), of(table_of(text=thrice, id=notes(list(range(9)), "annotator's own id"))))


def test_texts_that_stand_twice_in_both_files_are_records_still() -> None:
    one, other = (table_of(text=notes(ids) * 2, age=list(range(6))) for ids in ([1, 2, 3], [3, 4, 5]))
    assert overlaps(of(one), of(other))


def test_a_row_of_short_cells_is_known_by_all_of_them_in_any_order() -> None:
    row = of(table_of(a=["yes"], b=["7"], c=[None]))
    assert overlaps(row, of(table_of(d=[7], e=["Yes "])))
    assert not overlaps(row, of(table_of(a=["yes"])))
    assert not overlaps(row, of(table_of(a=["yes7"])))


def test_class_names_that_both_files_repeat_join_nothing() -> None:
    one, other = (table_of(text=notes(ids), label=[LABEL] * 8) for ids in (list(range(8)), list(range(8, 16))))
    assert not overlaps(of(one), of(other))


def test_times_that_two_files_share_join_nothing() -> None:
    when = "2026-03-01T09:00:00.000000+00:00"
    assert not overlaps(of(table_of(at=[when], text=["yes"])), of(table_of(at=[when], text=["no"])))
    assert overlaps(of(table_of(at=[when], text=["yes"])), of(table_of(time=[when], reply=["yes"])))


def test_messages_are_compared_turn_by_turn_and_a_system_prompt_joins_nothing() -> None:
    def chats(ids: list[int], *, system: bool = True) -> Table:
        start = [{"role": "system", "content": "You are a careful assistant of this bank."}] * system
        return table_of(messages=[[*start, {"role": "user", "content": note}] for note in notes(ids)])

    assert not overlaps(of(chats([1, 2, 3])), of(chats([4, 5, 6])))
    assert overlaps(of(chats([1, 2, 3])), of(chats([3, 4, 5])))
    assert overlaps(of(chats([1, 2, 3])), of(chats([3, 4, 5], system=False)))
    assert overlaps(of(chats([1, 2, 3])), of(table_of(question=notes([3]))))


@pytest.mark.parametrize(
    ("one", "other"), [("p1", " p1 "), ("Jos\u00e9", "Jose\u0301"), (7, 7.0), (7, "7"), (True, "true")]
)
def test_an_id_is_the_same_person_as_it_is_the_same_unit(one: object, other: object) -> None:
    left = of(table_of(patient=[one], note=["short"]), "patient")
    assert overlaps(left, of(table_of(patient=[other], note=["other"]), "patient"))
    assert not overlaps(left, of(table_of(account=[other], note=["other"]), "account"))
    assert not overlaps(left, of(table_of(patient=[other], note=["other"])))


@given(cells=st.lists(st.text(min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=20))
def test_a_population_has_as_many_people_as_the_table_has_units(cells: list[str]) -> None:
    table = table_of(patient=list(cells))
    assert len(of(table, "patient").units) == units_of(table, "patient").count


def test_the_format_of_the_file_does_not_matter(tmp_path: Path) -> None:
    rows = [{"id": i, "note": f"Grüße, this is visit\nnumber {i}", "ok": i % 2 == 0, "x": i / 4} for i in range(9)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "two.parquet")
    with (tmp_path / "three.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(reversed([row | {"x": int(row["x"]) if row["x"] % 1 == 0 else row["x"]} for row in rows]))
    found = {of(read_table(str(path)), "id").to_bytes() for path in tmp_path.iterdir()}
    assert len(found) == 1


def test_pseudonyms_are_those_of_the_standard_library_and_need_the_key() -> None:
    found = of(table_of(patient=["P1"], note=["A Note of more  than twenty characters"]), "patient")
    expected = hmac.new(KEY, b"cell\0a note of more than twenty characters", "sha256").digest()[:16]
    assert found.records.tobytes() == expected
    assert found.units.tobytes() == hmac.new(KEY, b"unit patient\0P1", "sha256").digest()[:16]
    other = of(table_of(patient=["P1"], note=["A Note of more  than twenty characters"]), "patient", bytes(32))
    assert not set(found.records) & set(other.records)


def test_what_cannot_be_compared_overlaps() -> None:
    table, other = table_of(note=notes([1])), table_of(note=notes([2]))
    assert not overlaps(of(table), of(other))
    assert overlaps(of(table), of(other, key=bytes(32)))
    assert overlaps(of(table), of(table_of(note=["", None])))


@given(ids=numbers)
def test_a_population_survives_a_trip_to_disk(ids: list[int]) -> None:
    before = of(table_of(p=ids, note=notes(ids), label=[LABEL] * len(ids)), "p")
    after = Population.from_bytes(before.to_bytes())
    assert after.to_bytes() == before.to_bytes()
    assert all(np.array_equal(getattr(after, part), getattr(before, part)) for part in ("units", "records", "repeated"))


def test_a_cut_another_version_and_another_order_are_refused() -> None:
    content = of(table_of(note=notes([1, 2, 3]))).to_bytes()
    broken = [content[:length] for length in range(len(content))]
    broken += [
        content + b"\0",
        content.replace(b"v1", b"v2"),
        content[:-16] + bytes(16),
        content[:-32] + 2 * content[-16:],
    ]
    for data in broken:
        with pytest.raises(DataError) as caught:
            Population.from_bytes(data)
        assert caught.value.code == "data.damaged-population"


def test_nothing_of_a_record_can_be_read_in_a_population() -> None:
    table = table_of(patient=["Martha Collins"], note=["CANARY a note about Martha Collins"], age=[50])
    content = of(table, "patient").to_bytes()
    assert not [word for word in (b"Martha", b"martha", b"CANARY", b"canary", b"patient") if word in content]


def real(name: str) -> Table:
    if not (FOLDER / name).is_file():
        pytest.skip(f"no file {name} in {FOLDER}; set FEDTUNE_DATA")
    return read_table(str(FOLDER / name))


def test_two_halves_of_bank_queries_are_two_data_sets_and_their_union_is_both() -> None:
    table = real("banking77/train.csv")
    firsts = {text.strip().casefold(): row for row, text in enumerate(map(str, table.columns["text"]))}
    rows = sorted(firsts.values())
    one, other = (of(table.take(rows[start::2])) for start in (0, 1))
    assert not overlaps(one, other)
    assert overlaps(of(table), one)
    assert overlaps(of(table), other)
    # The class names alone, in another file, are no records of it.
    assert not overlaps(one, of(table_of(category=list(table.columns["category"]) * 2)))


def test_medical_answers_are_found_again_after_all_that_can_happen_to_a_file() -> None:
    table = real("medquad/medquad.jsonl.gz")
    answers = replace(table.select(["answer"]), columns={"target": table.columns["answer"]})
    part = answers.take(range(7, table.rows, 1000))
    assert overlaps(of(table), of(part))


def test_real_sites_of_one_source_share_questions_and_no_answers() -> None:
    table = real("medquad/medquad.jsonl.gz")
    rows = [np.flatnonzero(np.array(table.columns["site"]) == site) for site in sorted(set(table.columns["site"]))]
    for columns, joined in (("question", 18), ("answer", 0)):
        sites = [of(table.select([columns]).take(held.tolist())) for held in rows]
        assert sum(overlaps(one, other) for one, other in combinations(sites, 2)) == joined


def test_published_splits_of_one_source_can_share_records() -> None:
    train, valid = (of(real(f"aci_bench/{split}.csv")) for split in ("train", "valid"))
    assert not overlaps(train, valid)
    assert overlaps(of(real("mts_dialog/train.csv")), of(real("mts_dialog/valid.csv")))
