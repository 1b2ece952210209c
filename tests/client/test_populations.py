"""Which earlier data sets of a site a new one shares its budget with."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.fingerprint import fingerprint
from fedtune.data.population import population
from fedtune.data.table import Table
from fedtune.errors import VaultError
from fedtune.journal.entries import DataRegistered
from fedtune.journal.spending import Spending
from fedtune_client.populations import Populations, joined, register

KEY = bytes(range(32))


def visits(*numbers: int, **columns: list[Any]) -> Table:
    held = {"note": tuple(f"Notes of the visit that has number {number}" for number in numbers)}
    return Table(held | {name: tuple(cells) for name, cells in columns.items()}, len(numbers), "x", "csv")


class Site:
    """A site's registrations as its journal would hold them."""

    def __init__(self, folder: Path) -> None:
        self.store = Populations(folder / "populations")
        self.known: dict[int, DataRegistered] = {}

    def add(self, table: Table, name: str, unit: str = "record", key: bytes = KEY) -> DataRegistered:
        entry = register(self.store, table, name, unit, key, self.known)
        self.known[10 * len(self.known)] = entry
        return entry


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_what_is_registered_says_what_the_file_is_and_nothing_of_its_records(site: Site, tmp_path: Path) -> None:
    table = visits(*range(123), patient=[f"CANARY{at // 2}" for at in range(123)])
    entry = site.add(table, "claims", "patient")
    assert (entry.name, entry.unit, entry.units, entry.joins) == ("claims", "patient", 62, ())
    assert entry.fingerprint == fingerprint(table, table.names)
    content = b"".join(file.read_bytes() for file in (tmp_path / "populations").iterdir())
    assert not [word for word in (b"CANARY", b"canary", b"visit") if word in content + repr(entry).encode()]


def test_a_file_under_another_name_with_more_rows_and_columns_joins(site: Site) -> None:
    site.add(visits(1, 2, 3), "claims")
    site.add(visits(7, 8, 9), "notes")
    assert site.add(visits(4, 2, 5, age=[50, 60, 70]), "fresh").joins == (0,)
    assert site.add(visits(20), "other").joins == ()


def test_the_same_name_or_the_same_content_joins(site: Site) -> None:
    site.add(visits(1), "claims")
    assert site.add(visits(2), "claims").joins == (0,)
    assert site.add(visits(2), "copy").joins == (10,)


def test_people_join_although_no_text_of_theirs_is_the_same(site: Site) -> None:
    site.add(visits(1, 2, patient=["a", "b"]), "last-year", "patient")
    assert site.add(visits(3, 4, patient=["b", "c"]), "this-year", "patient").joins == (0,)
    assert site.add(visits(5, patient=["d"]), "others", "patient").joins == ()


def test_a_population_that_is_lost_or_damaged_joins_all_that_come_after(site: Site) -> None:
    for number, damage in enumerate((bytes.fromhex, lambda name: b"", lambda name: b"fedtune population v9\n")):
        entry = site.add(visits(100 + number), f"set-{number}")
        file = site.store.folder / f"{entry.population}.population"
        assert site.store.lost(site.known) == tuple(range(0, 10 * number, 10))
        file.write_bytes(damage(entry.population))
    assert site.store.lost(site.known) == (0, 10, 20)
    assert site.add(visits(200), "new").joins == (0, 10, 20)


def test_a_population_put_in_anothers_place_is_not_believed(site: Site) -> None:
    first, second = site.add(visits(1), "one"), site.add(visits(2), "two")
    files = [site.store.folder / f"{entry.population}.population" for entry in (first, second)]
    files[0].write_bytes(files[1].read_bytes())
    assert site.store.lost(site.known) == (0,)
    assert site.add(visits(3), "three").joins == (0,)


def test_deleting_the_whole_folder_resets_no_budget(site: Site) -> None:
    site.add(visits(1), "one")
    site.add(visits(1, 2), "two")
    for file in site.store.folder.iterdir():
        file.unlink()
    site.store.folder.rmdir()
    assert site.add(visits(9), "three").joins == (0, 10)
    spending = Spending()
    for number, entry in site.known.items():
        spending.register(number, entry)
    assert spending.accounts() == {0: (0, 10, 20)}


def test_populations_under_a_key_that_was_lost_join(site: Site) -> None:
    site.add(visits(1), "one")
    assert site.add(visits(2), "two", key=bytes(32)).joins == (0,)


def test_a_join_through_a_third_data_set_is_one_account(site: Site) -> None:
    for name, table in (("one", visits(1)), ("two", visits(2)), ("far", visits(9)), ("both", visits(1, 2))):
        site.add(table, name)
    spending = Spending()
    for number, entry in site.known.items():
        spending.register(number, entry)
    assert spending.accounts() == {0: (0, 10, 30), 20: (20,)}


def test_registering_again_after_a_crash_writes_the_same_again(site: Site) -> None:
    first = register(site.store, visits(1, 2), "claims", "record", KEY, {})
    assert register(site.store, visits(2, 1), "claims", "record", KEY, {}) == first
    assert len(list(site.store.folder.iterdir())) == 1


def test_populations_are_for_this_user_alone(site: Site) -> None:
    entry = site.add(visits(1), "one")
    file = site.store.folder / f"{entry.population}.population"
    assert stat.S_IMODE(site.store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(VaultError) as caught:  # and no join for ever because of a mode that can be put right
        site.add(visits(2), "two")
    assert caught.value.code == "vault.permissions"
    assert "chmod" in caught.value.hint


def test_a_unit_that_the_file_does_not_have_is_refused_before_anything_is_written(site: Site) -> None:
    with pytest.raises(Exception, match="no column 'patient'"):
        site.add(visits(1), "one", "patient")
    assert not site.store.folder.exists()


registered = st.builds(
    DataRegistered,
    name=st.sampled_from(["a", "b", "c"]),
    fingerprint=st.sampled_from(["0" * 64, "1" * 64, "2" * 64]),
    unit=st.just("record"),
    units=st.just(10),
    population=st.sampled_from(["a" * 64, "b" * 64]),
    joins=st.just(()),
)


@given(known=st.lists(registered, max_size=6), overlapping=st.sets(st.sampled_from(["a" * 64, "b" * 64])))
def test_what_is_joined_is_all_that_cannot_be_shown_to_be_apart(
    known: list[DataRegistered], overlapping: set[str]
) -> None:
    numbered = dict(enumerate(known))
    found = joined("a", "0" * 64, numbered, lambda entry: entry.population in overlapping)
    apart = [numbered[number] for number in numbered if number not in found]
    assert all(e.name != "a" and e.fingerprint != "0" * 64 and e.population not in overlapping for e in apart)
    assert all(
        numbered[n].name == "a" or numbered[n].fingerprint == "0" * 64 or numbered[n].population in overlapping
        for n in found
    )
    assert list(found) == sorted(found)


def test_the_population_on_disk_is_the_one_that_was_made(site: Site) -> None:
    table = visits(1, 2, patient=["a", "b"])
    entry = site.add(table, "one", "patient")
    stored = site.store.read(entry.population)
    assert stored is not None
    assert stored.to_bytes() == population(table, "patient", KEY).to_bytes()
