"""A data set's budget follows its people: whatever is done to the file, what was spent stays spent."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from fedtune_client import operator
from fedtune_client.policy.schema import Policy
from tests.client.authority.conftest import MakeSite, MakeStudy
from tests.support.sites import NAME, RealSite, Study, point_at, policy_of
from tests.support.tiny import bank_csv


@pytest.fixture
def spent(make_a_site: MakeSite, make_other_study: MakeStudy) -> RealSite:
    """A site that has spent half of a study of two rounds."""
    site = make_a_site(study=make_other_study())
    site.update(1)
    return site


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def write(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def renamed(site: RealSite) -> Path:
    return site.data.rename(site.path / "other-name.csv")


def reordered(site: RealSite) -> Path:
    header, *rows = rows_of(site.data)
    write(site.data, [header, *reversed(rows)])
    return site.data


def another_format(site: RealSite) -> Path:
    header, *rows = rows_of(site.data)
    path = site.path / "claims.jsonl"
    path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    site.data.unlink()
    return path


def rows_added(site: RealSite) -> Path:
    write(site.data, [*rows_of(site.data), ["my new card number 7", "card", "patient-new"]])
    return site.data


def rows_removed(site: RealSite) -> Path:
    write(site.data, rows_of(site.data)[:-20])
    return site.data


def column_added(site: RealSite) -> Path:
    write(site.data, [[*row, "x"] for row in rows_of(site.data)])
    return site.data


def all_rewritten(site: RealSite) -> Path:
    return bank_csv(site.data, rows=80, labels=3, patients=3, seed=5)


def total(site: RealSite) -> int:
    """The steps that the account of the newest registration has spent."""
    spending = site.open().journal.state.spending
    data = spending.latest(NAME)
    assert data is not None
    return sum(event.steps for event in spending.spent(data).events)


@pytest.mark.parametrize("change", [renamed, reordered, another_format])
def test_the_same_records_in_another_file_need_no_other_grant(spent: RealSite, change: object) -> None:
    assert callable(change)
    point_at(spent, change(spent))
    (event,) = spent.restart().update(2).events
    assert event.steps == total(spent) == 4
    assert len(spent.entries("data-registered")) == 1
    assert spent.refusal(1, spent.study.another(1)) == "ledger.over-cap"


@pytest.mark.parametrize("change", [rows_added, rows_removed, column_added, all_rewritten])
def test_other_records_under_the_name_need_a_grant_and_go_on_with_the_budget(spent: RealSite, change: object) -> None:
    assert callable(change)
    point_at(spent, change(spent))
    assert spent.restart().refusal(2) == "consent.other-data"
    assert spent.charged == 1
    spent.grant()
    (event,) = spent.restart().update(2).events
    assert event.steps == total(spent) == 4
    assert spent.refusal(1, spent.study.another(1)) == "ledger.over-cap"


def test_a_file_put_back_as_it_was_needs_a_grant_again_and_has_the_same_budget(spent: RealSite) -> None:
    before = spent.data.read_bytes()
    rows_added(spent)
    spent.grant()
    spent.data.write_bytes(before)
    assert spent.restart().refusal(2) == "consent.other-data"
    spent.grant()
    spent.update(2)
    assert total(spent) == 4


def second_data_set(site: RealSite, study: Study, path: Path, units: tuple[str, ...] = ("record",)) -> RealSite:
    """The same site, asked by a study of a second data set."""
    tree = policy_of(site.study.plan, data__claims__units=units).model_dump(mode="json")
    tree["data"]["letters"] = tree["data"][NAME]
    operator.adopt(site.open(), Policy.model_validate(tree))
    point_at(site, site.data, letters=path)
    operator.grant(site.open(), "letters", "research", None, None)
    return RealSite(site.path, study).restart()


def letters_of(site: RealSite, people: str) -> Path:
    """Other texts than the first data set's, about its people or about those of another first letter."""
    path = site.path / "letters.csv"
    header, *rows = rows_of(site.data)
    write(
        path, [header, *([f"letter {n} of {text}", label, people + who] for n, (text, label, who) in enumerate(rows))]
    )
    return path


def test_a_second_data_set_that_shares_records_shares_the_budget(spent: RealSite, make_other_study: MakeStudy) -> None:
    path = letters_of(spent, "x")
    write(path, [*rows_of(path), *rows_of(spent.data)[1:3]])
    other = second_data_set(spent, make_other_study(data__name="letters"), path)
    assert other.refusal(1) == "ledger.over-cap"  # the policy's ε is that of one study's two rounds
    assert (other.charged, spent.charged) == (1, 1)
    spent.restart().update(2)


def test_a_second_data_set_about_the_same_people_shares_the_budget(
    make_a_site: MakeSite, make_other_study: MakeStudy
) -> None:
    """Also when the first was registered by its records and a policy has named the people since."""
    keys = {"privacy__unit": "patient_id", "federation__sites": 1}
    site = make_a_site(study=make_other_study(**keys), data__claims__units=["record"])
    site.adopt(data__claims__units=["patient_id"])
    assert site.refusal(1) == "consent.other-unit"
    site.grant()
    site.update(1)
    assert [entry["unit"] for entry in site.entries("data-registered")] == ["record", "patient_id"]
    path = letters_of(site, "")
    other = second_data_set(site, make_other_study(data__name="letters", **keys), path, ("patient_id",))
    assert other.refusal(1) == "ledger.over-cap"
    assert other.charged == 1


def test_a_second_data_set_of_other_people_has_a_budget_of_its_own(
    spent: RealSite, make_other_study: MakeStudy
) -> None:
    other = second_data_set(spent, make_other_study(data__name="letters"), letters_of(spent, "x"))
    other.update(1)
    other.update(2)
    assert total(spent) == 2


def test_without_populations_a_new_data_set_shares_every_budget(spent: RealSite, make_other_study: MakeStudy) -> None:
    path = letters_of(spent, "x")
    shutil.rmtree(spent.path / "populations")
    other = second_data_set(spent, make_other_study(data__name="letters"), path)
    assert other.refusal(1) == "ledger.over-cap"
    (_, letters) = spent.entries("data-registered")
    assert len(letters["joins"]) == 1


def test_a_budget_that_is_spent_by_records_is_not_spent_by_people(spent: RealSite, make_other_study: MakeStudy) -> None:
    study = make_other_study(privacy__unit="patient_id", federation__sites=1)
    operator.adopt(spent.open(), policy_of(study.plan))
    spent.grant()
    other = RealSite(spent.path, study).restart()
    assert other.refusal(1) == "ledger.other-unit"
    assert other.charged == 1
