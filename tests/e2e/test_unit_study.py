"""A whole study about patients by the command line: what is counted, what is promised, and what stays at a site."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import dp_accounting
import pytest

from fedtune.config.compose import compose
from fedtune.data.labels import label_names
from fedtune.model.build import load_tokenizer
from fedtune.privacy.accounting import Event, epsilon
from fedtune.privacy.plan import public_count
from fedtune.simulation.resolve import read_records, resolve
from fedtune.simulation.sites import dealt
from tests.support.runs import Study, command, events, summary_of
from tests.support.tiny import bank_csv

ONE_UNIT = "one unit (all records with the same patient_id, of which at most 3 are used in a step)"
ABOUT = ["privacy.unit=patient_id", "privacy.max_records_per_unit=3"]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bank_csv(tmp_path_factory.mktemp("patients") / "records.csv", rows=120, patients=40)


def words(study: Study, records: Path, *changes: str) -> list[str]:
    return study.words(f"data.path={records}", *ABOUT, *changes)


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_a_study_about_patients_says_so_in_every_output(
    study: Study, records: Path, tmp_path: Path, noise: str
) -> None:
    run = tmp_path / "run"
    done = command("simulate", *words(study, records, f"privacy.noise={noise}"), f"run.dir={run}")
    assert done.code == 0, done.err
    shown, told = (" ".join(text.split()) for text in (done.out, done.err))
    summary = json.loads((run / "summary.json").read_text())
    assert f"for {ONE_UNIT}" in shown
    assert f"for {ONE_UNIT}" in told
    assert (summary["privacy"]["unit"], summary["privacy"]["max_records_per_unit"]) == ("patient_id", 3)
    assert f"for {ONE_UNIT} added to or removed" in summary["privacy"]["statement"]
    assert "facts repeated in several units, a site's rounded number of units" in summary["privacy"]["statement"]
    card = (run / "adapter" / "README.md").read_text()
    assert "| privacy unit | patient_id |" in card
    assert f"{ONE_UNIT} added or removed" in card
    assert {line["event"]["unit"] for lines in events(run).values() for line in lines} == {"patient_id"}


def test_what_is_counted_is_patients(study: Study, records: Path) -> None:
    resolved = resolve(compose(words(study, records)))
    found = dealt(resolved.plan.json_text, resolved.machine, load_tokenizer(resolved.base))
    sites = [found.site(index) for index in range(3)]
    counts = [site.units.count for site in sites]
    assert sum(counts) < 40 < sum(len(site.train) for site in sites)
    assert [size.units for size in resolved.sites] == [public_count(count) for count in counts]
    assert resolved.plan.promise.delta == pytest.approx(max(counts) ** -1.1)
    summary = summary_of(*words(study, records))
    assert [site["units"] for site in summary["sites"]] == [public_count(count) for count in counts]
    promise = resolved.plan.promise
    event = Event(promise.noise_multiplier, 0.5, 2, 1.0, unit="patient_id")
    assert summary["privacy"]["max_epsilon"] == pytest.approx(epsilon([event], promise.delta))


def test_giving_the_same_records_to_fewer_patients_changes_epsilon_as_theory_says(study: Study, tmp_path: Path) -> None:
    """ε of a unit does not know how many records it has; δ = 1/N^1.1 knows how many units there are, and ε follows."""
    promises = []
    for patients in (120, 40, 12):
        file = tmp_path / f"{patients}.csv"
        cells = (
            f"my {word} {row},{word},{row % patients}" for row in range(120) for word in [["card", "cash"][row % 2]]
        )
        file.write_text("\n".join(["text,category,patient_id", *cells]))
        kept = ["privacy.noise_multiplier=1.0", "federation.sites=1", "data.holdout=0"]
        promises.append(resolve(compose(words(study, file, *kept))).plan.promise)
    for promise, patients in zip(promises, (120, 40, 12), strict=True):
        assert promise.delta == pytest.approx(patients**-1.1)
        assert promise.epsilon == pytest.approx(epsilon([Event(1.0, 0.5, 2, 1.0)], patients**-1.1))
    assert promises[0].epsilon > promises[1].epsilon > promises[2].epsilon > 0
    fixed = [replace(promise, delta=1e-5).forecast() for promise in promises]
    assert fixed[0] == fixed[1] == fixed[2]


def test_control_with_records_as_units_a_patients_epsilon_grows_with_its_records() -> None:
    """k records of one patient move a sum by k C: at rate 1 that is the Gaussian mechanism with noise σ/k."""
    patient = [dp_accounting.get_epsilon_gaussian(4.0 / k, 1e-5) for k in (1, 2, 8)]
    assert patient[0] == pytest.approx(epsilon([Event(4.0, 1.0, 1, 1.0, unit="patient_id")], 1e-5))
    assert patient[2] > 4 * patient[1] / 2 > 4 * patient[0] / 2


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity"])
@pytest.mark.parametrize("extra", [[], ["privacy=off", *ABOUT]])
def test_no_patient_is_at_two_sites_or_both_trained_and_measured_on(
    study: Study, records: Path, scheme: str, extra: list[str]
) -> None:
    settings = compose(words(study, records, f"data.partition.scheme={scheme}", "data.partition.alpha=5", *extra))
    resolved = resolve(settings)
    table, _ = read_records(settings)
    names = label_names(table, "patient_id")
    found = dealt(resolved.plan.json_text, resolved.machine, load_tokenizer(resolved.base))
    sides = [{names[row] for row in rows} for _, train, held in found.deal.sites for rows in (train, held)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 40
    assert all(sides)
    assert sum(len(train) + len(held) for _, train, held in found.deal.sites) == 120


def test_control_with_records_as_units_patients_are_torn_apart(study: Study, records: Path) -> None:
    settings = compose(study.words(f"data.path={records}"))
    table, _ = read_records(compose(words(study, records)))
    names = label_names(table, "patient_id")
    resolved = resolve(settings)
    found = dealt(resolved.plan.json_text, resolved.machine, load_tokenizer(resolved.base))
    sides = [{names[row] for row in rows} for _, train, held in found.deal.sites for rows in (train, held)]
    assert sum(map(len, sides)) > len(set.union(*sides))


@pytest.mark.parametrize("extra", ["privacy=off", "privacy.noise=seeded", "training.optimizer_state=keep"])
def test_no_patients_name_is_in_the_run_folder_or_on_the_screen(
    study: Study, records: Path, tmp_path: Path, extra: str
) -> None:
    run = tmp_path / "run"
    changes = [extra, *ABOUT, "training.momentum=0.5", "aggregation=fedit", f"run.dir={run}", "--verbose"]
    done = command("simulate", *words(study, records, *changes))
    assert done.code == 0, done.err
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if b"patient-0" in path.read_bytes()]
    assert "patient-0" not in done.out + done.err
    assert "patient-0" in records.read_text()


def test_a_unit_at_two_sites_is_a_warning_with_their_number(study: Study, records: Path) -> None:
    by_column = ["data.partition.scheme=column", "data.partition.column=category", "federation.sites=2"]
    resolved = resolve(compose(words(study, records, *by_column)))
    (warning,) = [text for text in resolved.warnings if "several sites" in text]
    table, _ = read_records(compose(words(study, records)))
    pairs = set(zip(label_names(table, "patient_id"), label_names(table, "category"), strict=True))
    assert warning.startswith(f"{len(pairs) - 40} units (values of patient_id)")
    assert not [text for text in resolve(compose(words(study, records))).warnings if "several sites" in text]


def test_the_plan_depends_on_the_unit_and_on_its_bound_only_where_there_is_one(study: Study, records: Path) -> None:
    def plan(*changes: str) -> str:
        return resolve(compose(study.words(f"data.path={records}", *changes))).plan.sha256

    assert len({plan(), plan(*ABOUT), plan(*ABOUT, "privacy.max_records_per_unit=4")}) == 3
    assert plan() == plan("privacy.max_records_per_unit=4")


def test_the_fingerprint_is_that_of_the_records_and_whose_they_are(study: Study, records: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, *changes: str) -> str:
        resolved = resolve(compose(study.words(f"data.path={path}", *changes)))
        return dealt(resolved.plan.json_text, resolved.machine, load_tokenizer(resolved.base)).sha256

    renamed = tmp_path / "records.csv"
    renamed.write_text(records.read_text().replace("patient-007", "patient-7"))
    assert fingerprint(records) == fingerprint(renamed)
    assert fingerprint(records, *ABOUT) != fingerprint(renamed, *ABOUT)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["privacy.unit=patientid"], "error[data.missing-column]: {path} has no column 'patientid'"),
        (["privacy.unit=category"], "error[data.unit-column]: privacy.unit=category"),
        (
            ["data.partition.scheme=column", "data.partition.column=patient_id", "federation.sites=40"],
            "error[data.unit-column]: privacy.unit=patient_id",
        ),
        (["federation.sites=41"], "error[data.more-sites-than-records]: 40 units cannot be dealt out to 41 sites"),
        (["privacy.max_records_per_unit=0"], "error[config.bad-value]: privacy.max_records_per_unit=0"),
        (["training.physical_tokens=0"], "error[config.bad-value]: training.physical_tokens=0"),
    ],
)
def test_a_unit_that_cannot_be_is_refused_before_the_study(
    study: Study, records: Path, changes: list[str], says: str
) -> None:
    done = command("plan", *words(study, records, *changes))
    assert done.code == 2
    assert says.format(path=records) in done.err


def test_a_record_that_nobody_owns_is_refused_with_its_line(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "records.csv"
    file.write_text("text,category,patient_id\nmy card,card,a\nmy cash,cash,\n")
    for words_ in (["simulate", *words(study, file)], ["data", "check", str(file), f"model.base={study.base}", *ABOUT]):
        done = command(*words_)
        assert done.code == 2
        assert f"error[data.blank-value]: {file}, line 3: column 'patient_id' is empty" in done.err
