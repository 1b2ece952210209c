"""Splitting a data set for real sites: each gets what its simulation has, and holds the same records out."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedtune.config.compose import compose
from fedtune.data.formats import read_table
from fedtune.data.templates import Example
from fedtune.data.units import units_of
from fedtune.errors import FedtuneError
from fedtune.simulation.apart import resolve_apart
from fedtune.simulation.resolve import resolve
from fedtune.simulation.sites import SiteData, dealt
from fedtune.simulation.split import STUDY_FILE, split, write_split
from fedtune_client.records import _site_data, _used
from tests.data.test_real_data import path_of
from tests.support.runs import Study
from tests.support.tiny import tiny_tokenizer

BRANCH = ("data.partition.scheme=column", "data.partition.column=branch")


def people(path: Path) -> Path:
    """Write records of numbered people, a number as 7 or as 7.0, who go to several branches; nobody reads `note`."""
    rows = [
        {
            "note": None,
            "text": f'my number {at}, said\r\n"so"',
            "category": ("card", "cash")[at % 2],
            "person": at % 11 if at % 2 else float(at % 11),
            "branch": ("north", "south", "west")[at % 3],
        }
        for at in range(66)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def known(data: SiteData) -> tuple[object, ...]:
    """What a site trains on and holds out, and whose records these are, in plain values."""

    def plain(examples: Sequence[Example]) -> list[object]:
        return [(example.input_ids.tolist(), example.target) for example in examples]

    units = data.units.of_record.tolist(), data.held_out_units.of_record.tolist()
    return data.name, plain(data.train), plain(data.held_out), *units


@pytest.mark.parametrize("fmt", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("privacy.unit=person",),
        ("privacy.unit=person", *BRANCH),
        ("data.partition.scheme=dirichlet", "data.limit=50", "data.holdout=0.4", "seed=5", "privacy=off"),
    ],
    ids=["records", "people", "people-at-several-sites", "dirichlet"],
)
def test_a_site_with_its_part_trains_on_and_holds_out_what_the_simulated_one_does(
    study: Study, tmp_path: Path, changes: tuple[str, ...], fmt: str
) -> None:
    settings = compose(study.words(f"data.path={people(tmp_path / 'people.jsonl')}", *changes))
    simulated = resolve(settings)
    files = write_split(split(settings), tmp_path / "out", "csv" if fmt == "csv" else "jsonl")
    plan = resolve_apart(compose([], tmp_path / "out" / STUDY_FILE)).plan
    assert plan.sha256 == simulated.plan.sha256
    whole = dealt(plan.json_text, simulated.machine, tiny_tokenizer())
    elsewhere = []
    for at, (name, file) in enumerate(files.items()):
        table = _used(read_table(str(file)), plan)
        real = _site_data(name, table, units_of(table, plan.promise.unit), plan, tiny_tokenizer(), "")
        assert known(real) == known(whole.site(at))
        other = _site_data("other", table, units_of(table, plan.promise.unit), plan, tiny_tokenizer(), "")
        elsewhere.append(known(other)[2] != known(real)[2])
    assert any(elsewhere)  # the control: a site of another name draws others


@pytest.mark.parametrize("fmt", ["csv", "jsonl"])
def test_every_record_goes_to_one_part_with_all_its_columns_in_the_order_of_the_file(
    study: Study, tmp_path: Path, fmt: str
) -> None:
    source = read_table(str(people(tmp_path / "people.jsonl")))
    found = split(compose(study.words(f"data.path={source.source}")))
    files = write_split(found, tmp_path / "out", "csv" if fmt == "csv" else "jsonl")
    parts = [read_table(str(file)) for file in files.values()]
    assert {part.names for part in parts} == {source.names}
    texts = [text for part in parts for text in part.column("text")]
    assert Counter(texts) == Counter(source.column("text"))
    order = {text: at for at, text in enumerate(source.column("text"))}
    for part in parts:
        assert [order[text] for text in part.column("text")] == sorted(order[text] for text in part.column("text"))


def test_made_up_messages_become_a_data_set_of_six_banks_and_a_study_of_them(study: Study, tmp_path: Path) -> None:
    small = [f"model.base={study.base}", "lora.layers=null", "data.limit=120"]
    found = split(compose(small))
    write_split(found, tmp_path / "out")
    settings = compose([], tmp_path / "out" / STUDY_FILE)
    told, made = resolve_apart(settings).plan, resolve(compose(small)).plan
    assert [part.table.rows for part in found.parts] == [20] * 6
    assert (told.data.name, told.data.source, told.data.limit) == ("bank-messages", "file", None)
    assert told.model_dump(exclude={"data"}) == made.model_dump(exclude={"data"})
    others = {"name", "source", "limit"}
    assert told.data.model_dump(exclude=others) == made.data.model_dump(exclude=others)


def test_banking77_in_three_parts_gives_the_plan_of_its_simulation(study: Study, tmp_path: Path) -> None:
    words = ["experiment=banking77", f"data.path={path_of('banking77/train.csv')}", "federation.sites=3"]
    settings = compose([*words, f"model.base={study.base}", "lora.layers=null"])
    found = split(settings)
    write_split(found, tmp_path / "out")
    assert [(part.table.rows, part.held_out) for part in found.parts] == [(3335, 667), (3334, 667), (3334, 667)]
    told = resolve_apart(compose([], tmp_path / "out" / STUDY_FILE))
    assert told.plan.sha256 == resolve(settings).plan.sha256
    assert len(told.plan.task.labels) == 77


def test_a_file_that_is_there_is_never_replaced(study: Study, tmp_path: Path) -> None:
    found = split(compose(study.words()))
    there = tmp_path / "site-002.csv"
    there.write_text("mine")
    with pytest.raises(FedtuneError) as caught:
        write_split(found, tmp_path)
    assert caught.value.code == "data.exists"
    assert [path.name for path in tmp_path.iterdir()] == ["site-002.csv"]
    assert there.read_text() == "mine"


def test_what_cannot_be_written_whole_leaves_nothing_behind(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / f".{STUDY_FILE}.partial").mkdir(parents=True)  # the last file that is written finds its place taken
    with pytest.raises(FedtuneError) as caught:
        write_split(split(compose(study.words())), out)
    assert caught.value.code == "data.unwritable"
    assert "--out" in caught.value.hint
    assert [path.name for path in out.iterdir()] == [f".{STUDY_FILE}.partial"]


def test_a_folder_that_is_a_file_is_refused_and_kept(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(FedtuneError) as caught:
        write_split(split(compose(study.words())), out)
    assert caught.value.code == "data.unwritable"
    assert out.read_text() == "mine"


def test_a_new_folder_is_its_owners_alone(study: Study, tmp_path: Path) -> None:
    write_split(split(compose(study.words())), tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_record_that_no_study_could_use_stops_the_split(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "blank.csv"
    file.write_text("text,category\nhello,card\n,cash\n")
    with pytest.raises(FedtuneError, match="line 3") as caught:
        split(compose(study.words(f"data.path={file}")))
    assert caught.value.code == "data.blank-value"
    with pytest.raises(FedtuneError, match="label") as caught:
        split(compose(study.words("privacy.unit=category")))
    assert caught.value.code == "data.unit-column"
