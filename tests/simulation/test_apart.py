"""A plan that is made where no record is: the same as with the records, or refused with what it needs to be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config.compose import compose
from fedtune.errors import FedtuneError
from fedtune.simulation.apart import resolve_apart
from fedtune.simulation.planning import Resolved
from fedtune.simulation.resolve import resolve
from tests.support.opens import opened_files
from tests.support.runs import Study
from tests.support.tiny import bank_csv, question_jsonl, tiny_base

TOLD = ("data.name=bank", "data.labels=[cash,card]", "privacy.delta=1e-3")
NOWHERE = "data.path=nowhere.csv"


def apart(study: Study, *changes: str) -> Resolved:
    return resolve_apart(compose(study.words(NOWHERE, *changes)))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("experiment=banking77", "lora.layers=null", "data.label=category"),
        ("privacy=off",),
        ("privacy.noise_multiplier=1.5", "privacy.noise=secure"),
        ("evaluation.site_metrics=noisy", "federation.rounds=5"),
        ("data.limit=40", "data.partition.scheme=quantity", "data.partition.alpha=2", "aggregation=ffa"),
    ],
    ids=["default", "banking77", "off", "noise", "noisy", "partition"],
)
def test_a_study_that_says_what_its_records_would_gives_the_same_plan_without_them(
    study: Study, changes: tuple[str, ...]
) -> None:
    with_records = resolve(compose(study.words(*changes, *TOLD)))
    assert apart(study, *changes, *TOLD).plan.sha256 == with_records.plan.sha256


def test_a_causal_study_needs_no_labels_for_the_same_plan(tmp_path: Path) -> None:
    base, file = tiny_base(tmp_path / "llama", "llama"), question_jsonl(tmp_path / "questions.jsonl")
    words = [f"model.base={base}", "lora.layers=null", "model.head_init=zero", "data.name=q", "privacy.delta=1e-3"]
    words += ["data.prompt=prompt", "data.completion=completion", "federation.sites=2", "data.max_tokens=24"]
    told = resolve_apart(compose(["data.source=file", *words]))
    assert told.plan.sha256 == resolve(compose([f"data.path={file}", *words])).plan.sha256
    assert told.plan.task.labels == ()


def test_labels_that_are_not_listed_are_those_of_the_public_test_file(study: Study, tmp_path: Path) -> None:
    test = bank_csv(tmp_path / "test.csv", rows=8, seed=1)
    named = [word for word in TOLD if not word.startswith("data.labels")]
    found = apart(study, *named, f"data.test={test}")
    assert found.plan.task.labels == ("card", "cash")
    assert found.plan.sha256 == apart(study, *TOLD).plan.sha256
    assert found.machine.test_path == str(test)


def test_a_test_file_with_a_label_that_is_not_listed_is_refused(study: Study, tmp_path: Path) -> None:
    test = bank_csv(tmp_path / "test.csv", rows=9, labels=3)
    with pytest.raises(FedtuneError) as caught:
        apart(study, *TOLD, f"data.test={test}")
    assert caught.value.code == "data.unknown-label"


def test_no_record_is_read_even_where_a_path_to_them_is_set(study: Study) -> None:
    with opened_files() as opened:
        found = resolve_apart(compose(study.words(*TOLD)))
    assert str(study.data) not in opened
    assert any(str(study.base) in path for path in opened)  # the control: what is read is seen
    assert (found.sites, found.machine.data_path) == ((), None)


def test_everything_that_a_study_does_not_say_is_named_at_once(study: Study) -> None:
    with pytest.raises(FedtuneError) as caught:
        apart(study)
    assert caught.value.code == "config.missing-value"
    assert all(
        key in caught.value.message for key in ("data.name=NAME", "data.labels=[", "data.test=", "privacy.delta")
    )
    with pytest.raises(FedtuneError, match=r"data\.text and data\.label"):
        apart(study, *TOLD, "data.text=null", "data.label=null")


def test_a_column_is_never_guessed(study: Study) -> None:
    with pytest.raises(FedtuneError, match=r"data\.label=COLUMN") as caught:
        apart(study, *TOLD, "data.task=classification", "data.label=null")
    assert caught.value.code == "config.missing-value"
    with pytest.raises(FedtuneError) as caught:
        apart(study, *TOLD, "data.prompt=question")
    assert caught.value.code == "data.conflicting-columns"


def test_without_privacy_no_delta_is_asked_for(study: Study) -> None:
    assert apart(study, *TOLD, "privacy=off", "privacy.delta=null").plan.promise.mode == "off"


def test_records_that_are_made_up_are_at_no_site(study: Study) -> None:
    with pytest.raises(FedtuneError) as caught:
        resolve_apart(compose(["data.name=bank"]))
    assert caught.value.code == "config.made-up-records"
    assert "fedtune data split" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("privacy.epsilon=0", "privacy.epsilon"),
        ("privacy.unit=category", "data.unit-column"),
        ("aggregation.weights=[0.5,0.5]", "aggregation.weights-length"),
        ("federation.sites_per_round=9", "config.sites-per-round"),
        ("data.max_tokens=100000", "model.sequence-limit"),
    ],
)
def test_what_is_refused_with_records_is_refused_without_them(study: Study, change: str, code: str) -> None:
    for made in (resolve, resolve_apart):
        with pytest.raises(FedtuneError) as caught:
            made(compose(study.words(*TOLD, change)))
        assert caught.value.code == code


def test_the_coordinator_is_told_for_which_sites_its_delta_means_something(study: Study) -> None:
    assert [text for text in apart(study, *TOLD).warnings if "fewer than 1,000 records" in text]
    assert "Seeded noise" in " ".join(apart(study, *TOLD).warnings)
