from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import Study, command
from tests.support.tiny import bank_csv, question_jsonl, tiny_base


def check(study: Study, path: Path, *words: str) -> list[str]:
    return ["data", "check", str(path), f"model.base={study.base}", "model.head_init=zero", *words]


def test_a_check_reports_what_a_study_would_find(study: Study) -> None:
    done = command(*check(study, study.data))
    assert done.code == 0, done.err
    assert "csv, 60 records" in done.out
    assert "task: classification (classification: text=text, label=category)" in done.out
    assert "labels: 2: card 30, cash 30" in done.out
    assert "exact duplicates: " in done.out
    assert "tokens: median " in done.out
    assert "are cut at data.max_tokens=128" in done.out
    assert "example 2: " in done.out
    assert "-> label card" in done.out


def test_a_check_in_json_counts_labels_duplicates_lengths_and_truncation(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "twice.csv"
    file.write_text("text,category\nabcd,x\nabcd,x\nabcdefgh,y\nab,y\n")
    found = command(*check(study, file, "data.max_tokens=6", "--format", "json")).json
    assert (found["rows"], found["format"], found["duplicates"]) == (4, "csv", 1)
    assert found["labels"] == {"x": 2, "y": 2}
    assert found["lengths"]["longest"] == 9  # a byte is a token, and one begins the text
    assert found["truncated"] == 0.25
    assert [sample["label"] for sample in found["samples"]] == ["x", "x"]


def test_the_loss_mask_of_a_completion_is_shown(study: Study, tmp_path: Path) -> None:
    file = question_jsonl(tmp_path / "questions.jsonl")
    base = tiny_base(tmp_path / "llama", "llama")
    words = ["data", "check", str(file), f"model.base={base}", "model.head_init=zero"]
    sample = command(*words, "--format", "json").json["samples"][0]
    trained = "".join(piece for piece, counts in sample["pieces"] if counts)
    assert trained.replace("Ġ", " ").strip("</s> ") == "card"
    text = command(*words).out
    assert "[c]" in text
    assert "([token] counts in the loss)" in text


def test_a_broken_file_is_one_error_with_its_line(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(json.dumps({"text": "a", "category": "x"}) + '\n{"text": \n')
    done = command(*check(study, file))
    assert (done.code, done.out) == (2, "")
    assert f"error[data.broken-json]: {file}, line 2" in done.err


def test_the_units_of_a_column_are_reported_with_their_number_and_sizes(study: Study, tmp_path: Path) -> None:
    file = bank_csv(tmp_path / "records.csv", rows=40, patients=5)
    words = ["privacy.unit=patient_id", "privacy.max_records_per_unit=6"]
    found = command(*check(study, file, *words, "--format", "json")).json
    assert found["units"] == {"column": "patient_id", "count": 5, "median": 4.0, "largest": 24}
    text = " ".join(command(*check(study, file, *words)).out.split())
    assert "privacy units: 5, one for each value of patient_id" in text
    assert "median 4, largest 24; a step uses at most 6 of them" in text
    assert command(*check(study, file, "--format", "json")).json["units"] is None


def test_a_split_names_each_sites_file_and_the_study_to_submit(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    words = ["data", "split", str(study.data), "--out", str(out), "data.text=text", "federation.sites=3"]
    done = command(*words)
    assert done.code == 0, done.err
    assert f"{out}/site-001.csv: 20 records, of which a site of this name holds out 4" in done.out
    assert f"submit it: fedtune server submit --config {out}/study.yaml" in done.out
    assert sorted(path.name for path in out.iterdir()) == [f"site-00{n}.csv" for n in (1, 2, 3)] + ["study.yaml"]
    again = command(*words)
    assert again.code == 2
    assert "error[data.exists]" in again.err


def test_a_split_in_json_and_in_another_format(study: Study, tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--to", "jsonl", "federation.sites=2", "data.name=bank", "--format", "json"]
    found = command("data", "split", str(study.data), *words).json
    assert (found["data"], found["study"]) == ("bank", str(tmp_path / "study.yaml"))
    assert [site["file"] for site in found["sites"]] == [str(tmp_path / f"site-00{n}.jsonl") for n in (1, 2)]
    assert [(site["records"], site["held_out"]) for site in found["sites"]] == [(30, 6), (30, 6)]


def test_without_a_path_the_records_of_the_settings_are_split(study: Study, tmp_path: Path) -> None:
    done = command("data", "split", "--out", str(tmp_path / "banks"), "data.limit=60", "--format", "json")
    assert [site["name"] for site in done.json["sites"]] == [f"synthetic-bank-0{n}" for n in range(1, 7)]
    first = command("data", "split", "federation.sites=2", f"data.path={study.data}", "--out", str(tmp_path / "two"))
    assert first.code == 0, first.err
    assert (tmp_path / "two" / "site-002.csv").exists()


def test_a_file_whose_name_looks_like_a_setting_can_be_split(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bank_csv(tmp_path / "seed=1.csv")
    done = command("data", "split", "seed=1.csv", "--out", "parts", "--format", "json")
    assert [site["records"] for site in done.json["sites"]] == [7, 7, 7, 7, 6, 6]
    assert "error[config.unknown-key]" in command("data", "split", "sed=1", "--out", "other").err
    assert not (tmp_path / "other").exists()
