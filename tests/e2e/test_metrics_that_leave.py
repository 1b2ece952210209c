"""Whole studies whose sites let metrics out rounded, or noised and charged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedtune.config.plan import StudyPlan
from fedtune.run.folder import RunFolder
from tests.support.runs import Study, command, events, released, summary_of
from tests.support.tiny import bank_csv, question_jsonl, tiny_base

NOISY = ("evaluation.site_metrics=noisy", "evaluation.every=2", "federation.rounds=3")


def plan_of(run: Path) -> StudyPlan:
    return StudyPlan.from_json(RunFolder(run).plan_file.read_text("utf-8").strip())


@pytest.mark.parametrize("changes", [[], ["privacy.unit=patient_id"], ["privacy.noise=secure"]], ids=str)
def test_noisy_metrics_are_charged_to_the_same_account_as_training(
    study: Study, tmp_path: Path, changes: list[str]
) -> None:
    run = tmp_path / "run"
    records = bank_csv(tmp_path / "bank.csv", rows=90, patients=30)
    summary = summary_of(*study.words(*NOISY, *changes, f"data.path={records}", f"run.dir={run}"))
    promise = plan_of(run).promise
    for charged in events(run).values():
        assert [(line["purpose"], line["round"]) for line in charged] == [
            ("metrics", 0),
            *[("training", 1), ("training", 2)],
            ("metrics", 2),
            *[("training", 3), ("metrics", 3)],
        ]
    assert summary["privacy"]["max_epsilon"] == promise.forecast() > promise.spent(3)
    assert all(site["epsilon"] == promise.forecast() for site in summary["sites"])
    assert summary["metrics"]["final"].keys() == {"accuracy", "loss", "accuracy_noise", "loss_noise"}
    assert "3 evaluations at noise multiplier" in summary["privacy"]["statement"]


def test_noisy_metrics_of_a_language_model(tmp_path: Path, study: Study) -> None:
    base, file = tiny_base(tmp_path / "base", "llama"), question_jsonl(tmp_path / "questions.jsonl")
    shared = [word for word in study.words() if not word.startswith(("data.", "model."))]
    found = [f"model.base={base}", f"data.path={file}", "data.prompt=prompt", "data.completion=completion"]
    summary = summary_of(*shared, *found, "data.max_tokens=24", *NOISY, f"run.dir={tmp_path / 'run'}")
    assert {"loss", "loss_noise"} <= summary["metrics"]["final"].keys()


def test_a_study_that_goes_on_measures_the_same_and_pays_once(study: Study, tmp_path: Path) -> None:
    run, cut = tmp_path / "run", tmp_path / "cut"
    whole = summary_of(*study.words(*NOISY, f"run.dir={run}"))
    shutil.copytree(run, cut)
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "adapter")
    max((cut / "checkpoints").iterdir()).unlink()
    done = command("simulate", "--resume", str(cut), "--format", "json")
    assert done.code == 0, done.err
    assert done.json["metrics"] == whole["metrics"]
    assert done.json["privacy"]["max_epsilon"] == whole["privacy"]["max_epsilon"]
    assert released(cut) == released(run)


def test_rounded_metrics_leave_no_confusion_and_cost_nothing(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    records = bank_csv(tmp_path / "bank.csv", rows=300)
    words = study.words("evaluation.site_metrics=coarse", f"data.path={records}", f"run.dir={run}")
    summary = summary_of(*words)
    assert summary["metrics"]["final"].keys() == {"accuracy", "loss"}
    for site in summary["sites"]:
        accuracy = site["metrics"]["final"]["accuracy"]
        assert accuracy == round(accuracy, 1)
    assert summary["privacy"]["max_epsilon"] == plan_of(run).promise.spent(2)
