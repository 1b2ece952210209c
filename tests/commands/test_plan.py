from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedtune.privacy.accounting import Event, epsilon
from tests.support.runs import Study, command, summary_of
from tests.support.tiny import bank_csv


def test_the_hash_of_a_plan_is_the_hash_of_its_run(study: Study) -> None:
    words = study.words("seed=3")
    document = command("plan", *words, "--format", "json").json
    summary = summary_of(*words)
    assert document["plan_sha256"] == summary["plan_sha256"]
    assert hashlib.sha256((Path(summary["run_dir"]) / "plan.json").read_bytes()).hexdigest() == summary["plan_sha256"]


def test_a_plan_states_privacy_size_traffic_and_memory(study: Study) -> None:
    document = command("plan", *study.words("privacy.epsilon=3", "training.local_steps=2"), "--format", "json").json
    privacy = document["privacy"]
    assert (privacy["sampling_rate"], privacy["steps"]) == (0.5, 4)
    event = Event(privacy["noise_multiplier"], 0.5, 4, 1.0)
    assert privacy["epsilon"] == pytest.approx(epsilon([event], privacy["delta"]))
    assert 2.9 < privacy["epsilon"] <= 3.0
    assert document["trainable_parameters"] > 0
    assert document["bytes_per_round"]["up"] == 4 * document["plan"]["adapter"]["upload"]
    assert document["memory_bytes"] > 1e8
    assert [site["name"] for site in document["sites"]] == ["site-001", "site-002", "site-003"]
    assert [site["held_out"] for site in document["sites"]] == [4, 4, 4]


def test_the_bytes_of_a_plan_are_those_that_travel(study: Study) -> None:
    words = study.words("federation.rounds=1", "evaluation.site_metrics=off", "aggregation=ffa")
    wire = command("plan", *words, "--format", "json").json["bytes_per_round"]
    traffic = summary_of(*words)["traffic"]
    for way in ("up", "down"):
        overhead = traffic[f"bytes_{way}"] - 3 * wire[way]
        assert (
            0 < overhead < 3 * 3 * 900
        )  # headers, heads and receipts of describe, train and describe, for three sites


def test_the_text_of_a_plan_names_everything_and_the_command_that_runs_it(study: Study) -> None:
    done = command("plan", *study.words("study.name=banks"))
    assert done.code == 0
    for text in (
        "plan SHA-256",
        "noise multiplier σ",
        "sampling rate q",
        "ε per site",
        "trainable",
        "memory, estimated",
    ):
        assert text in done.out
    assert f"run it: fedtune simulate data.path={study.data}" in done.out


def test_a_plan_writes_nothing_and_holds_no_fact_of_this_machine(study: Study, tmp_path: Path) -> None:
    done = command("plan", *study.words(f"run.root={tmp_path}"), "--format", "json")
    assert list(tmp_path.iterdir()) == []
    assert str(study.folder) not in str(done.json["plan"])


def test_what_cannot_work_is_refused_with_the_reason(study: Study) -> None:
    done = command("plan", *study.words("aggregation=fedsvd", "aggregation.server_optimizer=fedadam"))
    assert done.code == 2
    assert "error[aggregation.adaptive-with-fedsvd]" in done.err
    assert "hint: use aggregation.server_optimizer=fedavgm" in done.err


def test_site_sampling_spends_at_most_the_plan(study: Study) -> None:
    words = study.words("federation.rounds=4", "federation.sites_per_round=1", "federation.sites=3")
    target = command("plan", *words, "--format", "json").json["privacy"]["epsilon"]
    spent = [site["epsilon"] for site in summary_of(*words)["sites"]]
    assert max(spent) <= target
    assert sum(spent) < 3 * target
    assert min(spent) < target


def test_a_plan_about_units_counts_them_and_names_them(study: Study, tmp_path: Path) -> None:
    records = bank_csv(tmp_path / "records.csv", rows=120, patients=40)
    words = study.words(f"data.path={records}", "privacy.unit=patient_id", "privacy.max_records_per_unit=3")
    document = command("plan", *words, "--format", "json").json
    assert (document["privacy"]["unit"], document["privacy"]["max_records_per_unit"]) == ("patient_id", 3)
    assert sum(site["units"] for site in document["sites"]) < 40
    shown = " ".join(command("plan", *words).out.split())
    assert "privacy unit one unit (all records with the same patient_id" in shown
    assert "training units" in shown


def test_a_bound_on_tokens_lowers_the_memory_that_is_estimated(study: Study) -> None:
    def memory(*changes: str) -> int:
        words = study.words("data.max_tokens=100", "training.physical_batch=50", *changes)
        return int(command("plan", *words, "--format", "json").json["memory_bytes"])

    assert memory("training.physical_tokens=1000") < memory("training.physical_tokens=5000") == memory()
    assert memory("training.physical_tokens=1") == memory("training.physical_tokens=100")  # one record always fits
