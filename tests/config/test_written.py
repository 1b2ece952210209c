"""Settings that are written to a file are the same settings when they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config.compose import compose
from fedtune.config.written import study_text

CHANGES = [
    [],
    ["data.source=file"],
    ["experiment=banking77", "aggregation.weights=[0.1,0.2,0.3,0.1,0.1,0.1,0.05,0.05]", "privacy.delta=1e-7"],
    ["experiment=medquad", "privacy=off", "lora.targets=[q_proj,v_proj]", "model.revision=null"],
    ["data.path=x.csv", "data.text=007", "data.label=off", "data.labels=['null',yes,1.0,' a: b','#c','é\u2028']"],
    ["data=bank_messages", "data.text=null", "data.partition.column=null", "data.partition.scheme=iid"],
    ["training.head_learning_rate=null", "training.noise_limit=null", "seed=9223372036854775807", "lora.alpha=1e-300"],
]


@pytest.mark.parametrize("words", CHANGES)
def test_a_study_is_read_back_as_it_was(tmp_path: Path, words: list[str]) -> None:
    file = tmp_path / "study.yaml"
    settings = compose([*words, "run.threads=3"])
    file.write_text(study_text(settings, "about it"), encoding="utf-8")
    found = compose([], file)
    assert found == settings.model_copy(update={"run": compose([]).run})


def test_a_file_says_what_differs_and_what_a_reader_looks_for() -> None:
    text = study_text(compose(["data.source=file", "data.name=claims", "privacy.delta=1e-5"]), "about it")
    assert text == (
        "# about it\nstudy:\n  name: study\ndata:\n  name: claims\n  source: file\nprivacy:\n  epsilon: 8.0\n"
        "  delta: 1.0e-05\nfederation:\n  sites: 6\n  rounds: 8\n"
    )
