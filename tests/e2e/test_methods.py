"""Every aggregation algorithm with every server optimiser runs a study, or is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.release.adapter import load_adapter
from tests.support.runs import Study, command, summary_of
from tests.support.tiny import question_jsonl, tiny_base

PLAIN = ("fedavg", "fedavgm")
ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
RUNS = [(algorithm, server) for algorithm in ("fedit", "ffa", "fedsvd") for server in PLAIN]
RUNS += [(algorithm, server) for algorithm in ("fedit", "ffa") for server in ADAPTIVE]


def easy_csv(folder: Path) -> Path:
    """Write texts that even a random encoder tells apart."""
    file = folder / "easy.csv"
    rows = (f"{'card' * (2 + n % 3)},card\n{'zoom' * (2 + n % 3)},zoom\n" for n in range(30))
    file.write_text("text,category\n" + "".join(rows))
    return file


@pytest.mark.parametrize(("algorithm", "server"), RUNS)
def test_a_combination_learns(study: Study, tmp_path: Path, algorithm: str, server: str) -> None:
    rate = 0.05 if server in ADAPTIVE else 1.0
    summary = summary_of(
        *study.words("privacy=off", "federation.rounds=8", "training.learning_rate=0.02"),
        f"data.path={easy_csv(tmp_path)}",
        f"aggregation.algorithm={algorithm}",
        f"aggregation.server_optimizer={server}",
        f"aggregation.server_learning_rate={rate}",
        "aggregation.momentum=0.5",
        f"run.dir={tmp_path / 'run'}",
    )
    assert summary["metrics"]["final"]["loss"] < summary["metrics"]["initial"]["loss"]
    adapter = load_adapter(tmp_path / "run" / "adapter")
    assert any(np.any(array) for name, array in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("server", ADAPTIVE)
def test_what_cannot_work_is_refused_with_the_reason_and_what_works(study: Study, server: str) -> None:
    done = command("plan", *study.words("aggregation=fedsvd", f"aggregation.server_optimizer={server}"))
    assert done.code == 2
    assert "error[aggregation.adaptive-with-fedsvd]" in done.err
    assert "turns B's basis" in done.err
    assert "hint: use aggregation.server_optimizer=fedavgm" in done.err


def test_fedsvd_with_a_kept_optimizer_state_is_refused(study: Study) -> None:
    words = study.words("aggregation=fedsvd", "training.optimizer=adamw", "training.optimizer_state=keep")
    assert "error[aggregation.kept-state-with-fedsvd]" in command("plan", *words).err


@pytest.mark.parametrize(
    "changes",
    [
        ["training.optimizer=adamw", "training.learning_rate=0.01", "training.schedule=cosine"],
        ["training.local_steps=3", "training.momentum=0.9", "training.physical_batch=2"],
        ["training.sampling_rate=1.0"],
        ["training.sampling_rate=0.001"],  # nearly every batch is empty, and a step all the same
        ["aggregation.weights=[0.5,0.3,0.2]"],
        ["aggregation.average_last=2", "evaluation.every=2"],
        ["data.partition.scheme=dirichlet", "data.partition.alpha=0.5"],
        ["data.partition.scheme=quantity"],
        ["data.partition.scheme=column", "data.partition.column=category", "federation.sites=2"],
        ["federation.sites=1"],
        ["federation.sites=30"],
        ["data.holdout=0"],
        ["data.limit=12"],
        ["evaluation.site_metrics=off"],
        ["model.head=architecture"],
        ["model.head_init=labels"],
        ["model.dtype=bfloat16"],
        ["lora.targets=all-linear", "lora.dropout=0.2"],
        ["privacy.noise_multiplier=2.0"],
    ],
    ids=lambda changes: changes[0],
)
def test_a_study_of_each_kind_ends_in_an_adapter_and_keeps_its_promise(
    study: Study, tmp_path: Path, changes: list[str]
) -> None:
    run = tmp_path / "run"
    summary = summary_of(*study.words(*changes, f"run.dir={run}"))
    words = study.words(*changes)
    promised = command("plan", *words, "--format", "json").json["privacy"]["epsilon"]
    assert 0 <= summary["privacy"]["max_epsilon"] <= promised * (1 + 1e-9)
    evaluated = command("evaluate", str(run), str(study.data), "--format", "json")
    assert 0 <= evaluated.json["metrics"]["accuracy"] <= 1


@pytest.mark.parametrize("privacy", ["off", "dp"])
def test_an_easy_task_is_learnt_with_and_without_privacy(study: Study, tmp_path: Path, privacy: str) -> None:
    words = study.words("federation.rounds=8", "evaluation.every=8", f"data.path={easy_csv(tmp_path)}")
    assert summary_of(*words, f"privacy={privacy}")["metrics"]["final"]["accuracy"] == 1.0


def test_a_head_that_solves_the_task_at_once_is_a_result(study: Study, tmp_path: Path) -> None:
    words = study.words("privacy=off", "federation.rounds=1", f"data.path={easy_csv(tmp_path)}")
    assert summary_of(*words)["metrics"]["final"]["accuracy"] == 1.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_language_model_learns_completions(study: Study, tmp_path: Path, architecture: str) -> None:
    base = tiny_base(tmp_path / "base", architecture)
    file = question_jsonl(tmp_path / "questions.jsonl")
    shared = [word for word in study.words() if not word.startswith(("data.", "model."))]
    summary = summary_of(
        *shared,
        f"data.path={file}",
        "data.prompt=prompt",
        "data.completion=completion",
        "data.max_tokens=32",
        f"model.base={base}",
        "model.head_init=zero",
        "privacy=off",
        "training.optimizer=adamw",
        "training.learning_rate=0.02",
        "federation.rounds=5",
    )
    initial, final = summary["metrics"]["initial"], summary["metrics"]["final"]
    assert final["loss"] < initial["loss"]
    assert final["perplexity"] == pytest.approx(np.exp(final["loss"]))
