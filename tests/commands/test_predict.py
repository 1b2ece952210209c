from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import Done, Study, command, summary_of
from tests.support.tiny import question_jsonl, tiny_base


@pytest.fixture(scope="module")
def run(study: Study) -> Path:
    folder = study.runs / "predicts"
    words = study.words("privacy=off", "federation.rounds=20", "training.learning_rate=0.3", "evaluation.every=20")
    summary_of(*words, f"run.dir={folder}")
    return folder


def lines(done: Done) -> list[dict[str, object]]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_predictions_come_one_a_record_in_the_order_of_the_file(run: Path, tmp_path: Path) -> None:
    texts = [f"my {'card' if n % 3 else 'cash'} number {n * 37 % 100}" + " please" * (n % 4) for n in range(25)]
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = lines(command("predict", str(run), str(file)))
    assert [line["text"] for line in found] == texts
    assert {line["label"] for line in found} <= {"card", "cash"}
    assert all(0.5 <= float(str(line["probability"])) <= 1 for line in found)


def test_predictions_agree_with_the_metrics_of_evaluate(study: Study, run: Path) -> None:
    found = lines(command("predict", str(run), str(study.data)))
    wanted = [line.split(",")[1] for line in study.data.read_text().splitlines()[1:]]
    hits = sum(line["label"] == label for line, label in zip(found, wanted, strict=True))
    accuracy = command("evaluate", str(run), str(study.data), "--format", "json").json["metrics"]["accuracy"]
    assert hits / len(wanted) == pytest.approx(accuracy)


def test_predictions_of_a_run_without_privacy_say_so_beside_them(study: Study, run: Path) -> None:
    assert "NOT PRIVATE" in command("predict", str(run), str(study.data)).err


def test_a_language_model_continues_prompts_without_their_completions(study: Study, tmp_path: Path) -> None:
    file, base = question_jsonl(tmp_path / "train.jsonl"), tiny_base(tmp_path / "llama", "llama")
    run = tmp_path / "run"
    words = [word for word in study.words() if not word.startswith(("data.", "model."))]
    task = [f"data.path={file}", "data.prompt=prompt", "data.completion=completion", "data.max_tokens=32"]
    summary_of(*words, *task, f"model.base={base}", "model.head_init=zero", f"run.dir={run}", "federation.rounds=1")
    new = tmp_path / "new.csv"
    new.write_text("prompt\nwhat is 7?\nwhat is 8 or 9?\n")
    found = lines(command("predict", str(run), str(new)))
    assert [str(line["prompt"]).strip() for line in found] == ["what is 7?", "what is 8 or 9?"]
    assert all(isinstance(line["completion"], str) for line in found)


def test_a_file_without_the_input_column_is_refused(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.csv"
    file.write_text("words\nhello\n")
    done = command("predict", str(run), str(file))
    assert (done.code, done.out) == (2, "")
    assert "error[data.missing-column]" in done.err
