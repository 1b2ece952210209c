from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.aggregation.comparison import report
from benchmarks.aggregation.comparison.command import QUICK
from benchmarks.aggregation.comparison.material import TEST_RECORDS_A_CLASS, split
from benchmarks.aggregation.comparison.running import costs_of, finished, key_of, results_of, run_all
from benchmarks.aggregation.comparison.runs import (
    BASELINE,
    FAMILIES,
    LEARNING_RATES,
    SEARCH_SEED,
    SEEDS,
    UPLOADS,
    Run,
    Upload,
    runs,
)
from benchmarks.simulation.data import missing
from fedtune.aggregation.compatibility import check
from fedtune.aggregation.lora.registry import ALGORITHMS
from fedtune.config.compose import compose

ROOT = Path(__file__).parents[2]
FEDIT = Run("fedit", "dirichlet", "off", 0)


def line(**changes: Any) -> dict[str, Any]:
    return {
        "test_accuracy": 0.8,
        "test_accuracy_before": 0.5,
        "site_accuracy": 0.7,
        "epsilon": None,
        "bytes_up": 8_000.0,
        "bytes_down": 16_000.0,
        "merging_seconds": 0.01,
        "failed": 0,
        "cpu_seconds": 1.0,
        **changes,
    }


def test_every_algorithm_runs_in_every_condition_with_every_seed_and_each_run_once() -> None:
    asked = runs(["algorithms"], SEEDS)
    assert len(asked) == len(ALGORITHMS) * 2 * 2 * 3 == len(set(asked)) == 132
    assert {run.algorithm for run in asked} == set(ALGORITHMS) == set(FAMILIES)
    assert {FAMILIES[name] for name in FAMILIES} == set(LEARNING_RATES)
    assert SEARCH_SEED not in SEEDS


def test_an_early_stop_leaves_whole_rows_of_the_first_seed() -> None:
    asked = runs(["algorithms", "bytes"], SEEDS)
    assert [run.seed for run in asked] == sorted(run.seed for run in asked)
    assert {run.algorithm for run in asked[: len(FAMILIES)]} == set(FAMILIES)


def test_the_curve_and_the_comparison_share_the_runs_without_compression() -> None:
    plain = sum(upload == Upload() for _, upload in UPLOADS)
    both = runs(["algorithms", "bytes"], [0])
    assert len(both) == len(runs(["algorithms"], [0])) + len(runs(["bytes"], [0])) - plain


@pytest.mark.parametrize("run", runs(["algorithms", "bytes"], [0]), ids=lambda run: " ".join(run.words))
def test_every_run_is_a_study_that_is_not_refused(run: Run) -> None:
    settings = compose(["experiment=aggregation", *run.words])
    check(settings)
    assert (settings.aggregation.algorithm, settings.seed) == (run.algorithm, run.seed)
    assert settings.aggregation.server_optimizer == "fedavg"
    assert settings.privacy.mode == run.privacy


def test_the_test_part_has_as_many_of_each_class_and_shares_no_record_with_training() -> None:
    records = [{"text": f"{label} {number}", "category": label} for label in "abc" for number in range(20)]
    train, test = split(records)
    assert Counter(record["category"] for record in test) == dict.fromkeys("abc", TEST_RECORDS_A_CLASS)
    assert {record["text"] for record in train}.isdisjoint(record["text"] for record in test)
    assert len(train) + len(test) == len(records)
    assert split(records) == (train, test)


def test_bytes_a_round_are_of_as_many_odd_as_even_rounds_without_the_first_and_the_evaluation() -> None:
    rounds = [
        {"round": number, "metrics": {} if number == 6 else None, "bytes_up": up, "bytes_down": 7}
        | {"merging_seconds": 0.5, "failed": {}}
        for number, up in enumerate([99, 1, 3, 1, 3, 99], start=1)
    ]
    assert costs_of(rounds) == {"bytes_up": 2, "bytes_down": 7, "merging_seconds": 0.5, "failed": 0}


def test_the_sites_accuracy_counts_each_held_out_record_once_and_a_personal_adapter_has_no_other() -> None:
    sites = [{"name": name, "metrics": {"final": {"accuracy": share}}} for name, share in (("a", 1.0), ("b", 0.0))]
    summary = {
        "sites": sites,
        "released": False,
        "metrics": {"initial": {"accuracy": 0.1}, "final": {"accuracy": 0.2}},
        "privacy": {"max_epsilon": None},
    }
    found = results_of(summary, {"a": 30, "b": 10})
    assert (found["site_accuracy"], found["test_accuracy"]) == (0.75, None)
    assert results_of({**summary, "released": True}, {"a": 30, "b": 10})["test_accuracy"] == 0.2


def test_the_table_has_means_and_spreads_of_seeds_and_no_test_accuracy_without_a_global_adapter() -> None:
    other = Run("fedit", "dirichlet", "off", 1)
    personal = Run("fedsa", "dirichlet", "off", 0)
    lines = {FEDIT: line(), other: line(test_accuracy=0.9), personal: line(test_accuracy=None)}
    text = report.render(lines, 132)
    assert "3 of 132 runs" in text
    assert "| `fedit` | 0.850 ± 0.071 | 0.700 ± 0.000 | 8 | 16 | 10.0 | 2 |" in text
    assert "| `fedsa` | - | 0.700 | 8 | 16 | 10.0 | 1 |" in text
    assert "IID" not in text


def test_the_best_small_upload_has_to_keep_the_accuracy_within_the_seeds_spread() -> None:
    base = [line(test_accuracy=accuracy, site_accuracy=accuracy) for accuracy in (0.78, 0.80, 0.82)]
    large, small = [line(bytes_up=1_001.0)] * 3, ("ffa", Upload("int4"))
    assert "No setting" in report.best({BASELINE: base, small: large})
    close = [line(bytes_up=1_000.0, test_accuracy=0.785, site_accuracy=0.785)] * 3
    assert "`ffa` int4, at 0.125 of it, within" in report.best({BASELINE: base, small: close})
    far = [line(bytes_up=1_000.0, test_accuracy=0.775, site_accuracy=0.785)] * 3
    assert "below" in report.best({BASELINE: base, small: far})


def test_a_finished_run_is_not_run_again_and_one_of_another_setting_does_not_stand_for_it(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"key": key_of(FEDIT, ())}) + "\n" + '{"key": "torn')
    run_all([FEDIT], None, (), results)  # type: ignore[arg-type] - a run would need it
    assert list(finished(results)) == [key_of(FEDIT, ())]
    assert key_of(FEDIT, ("federation.rounds=20",)) not in finished(results)


@pytest.mark.slow
def test_the_quick_comparison_measures_every_column_and_resumes(tmp_path: Path) -> None:
    if missing():
        pytest.skip(missing())
    command = [sys.executable, "-m", "benchmarks.aggregation", "comparison", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert "7 of 7 runs" in done.stdout
    assert "| `fedit` int4 | 0." in done.stdout
    lines = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert all(found["merging_seconds"] > 0 and found["failed"] == 0 for found in lines)
    assert all(" ".join(QUICK) in found["key"] for found in lines)
    with (tmp_path / "test.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 77 * TEST_RECORDS_A_CLASS
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    assert again.stdout == done.stdout
