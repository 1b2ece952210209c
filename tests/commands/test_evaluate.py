from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.simulation.workspace import _opened
from tests.support.runs import Study, command, summary_of
from tests.support.tiny import bank_csv, tiny_base


@pytest.fixture(scope="module")
def test_file(study: Study) -> Path:
    return bank_csv(study.folder / "test.csv", rows=20, seed=9)


@pytest.fixture(scope="module")
def run(study: Study, test_file: Path) -> Path:
    folder = study.runs / "evaluated"
    words = study.words(f"data.test={test_file}", "data.holdout=0", "privacy=off", "training.learning_rate=0.1")
    summary_of(*words, f"run.dir={folder}")
    return folder


def test_evaluate_measures_what_the_run_measured_on_the_same_records(study: Study, run: Path, test_file: Path) -> None:
    at_the_end = command("simulate", "--resume", str(run), "--format", "json").json["metrics"]
    assert command("evaluate", str(run), str(test_file), "--format", "json").json["metrics"] == at_the_end["final"]
    assert at_the_end["initial"] != at_the_end["final"]


def test_evaluate_of_a_run_without_privacy_says_so(run: Path, test_file: Path) -> None:
    assert "NOT PRIVATE" in command("evaluate", str(run), str(test_file)).out
    privacy = command("evaluate", str(run), str(test_file), "--format", "json").json["privacy"]
    assert privacy["statement"].startswith("NOT PRIVATE")


def test_an_adapter_is_usable_where_its_folder_was_moved_to(run: Path, test_file: Path, tmp_path: Path) -> None:
    before = command("evaluate", str(run), str(test_file), "--format", "json").json
    moved = run.rename(tmp_path / "moved")
    try:
        after = command("evaluate", str(moved), str(test_file), "--format", "json").json
    finally:
        moved.rename(run)
    assert after["metrics"] == before["metrics"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("text,category\nhello,elephant\n", "data.unknown-label"),
        ("text\nhello\n", "data.missing-column"),
        ("text,category\n", "data.empty-file"),
    ],
)
def test_records_that_do_not_fit_the_run_are_refused(run: Path, tmp_path: Path, content: str, code: str) -> None:
    file = tmp_path / "other.csv"
    file.write_text(content)
    done = command("evaluate", str(run), str(file))
    assert (done.code, done.out) == (2, "")
    assert f"error[{code}" in done.err
    assert "hint: " in done.err


def test_a_run_that_has_not_ended_has_no_adapter_to_evaluate(study: Study, test_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command("simulate", *study.words("training.learning_rate=1e6", f"run.dir={run}"))  # no update is accepted
    done = command("evaluate", str(run), str(test_file))
    assert "error[run.no-adapter]" in done.err
    assert "fedtune simulate --resume" in done.err


def test_a_base_that_has_changed_is_refused(study: Study, tmp_path: Path, test_file: Path) -> None:
    base, run = tiny_base(tmp_path / "base", seed=1), tmp_path / "run"
    summary_of(*study.words(f"model.base={base}", f"run.dir={run}", "federation.rounds=1"))
    tiny_base(base, seed=2)
    _opened.cache_clear()  # a later command is a process of its own
    done = command("evaluate", str(run), str(test_file))
    assert "error[model.other-base]" in done.err
