"""A released adapter and a merged model compute the same in plain transformers and PEFT as in the study."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedtune.data.batches import collate
from fedtune.model.base import open_base
from fedtune.release.adapter import save_adapter
from fedtune.release.merge import write_merged
from fedtune.release.parity import PROMPTS
from fedtune.simulation.workspace import open_released
from tests.support.bench import Bench, make_bench, summary_of
from tests.support.releases import at_rank

LOADERS = {"pooled": "AutoModel", "none": "AutoModelForCausalLM", "architecture": "AutoModelForSequenceClassification"}
CASES = [
    ("bert", "pooled", 2, {}),
    ("bert", "architecture", 2, {}),
    ("deberta", "architecture", 3, {}),
    ("gpt2", "none", 2, {}),
    ("gpt2", "none", 7, {"lora__targets": "all-linear"}),
    ("llama", "none", 2, {"lora__alpha": 0.7}),
    ("llama", "none", 5, {"lora__layers": [0], "base": {"num_hidden_layers": 2}}),
    ("qwen2", "none", 2, {}),
    ("qwen2", "architecture", 2, {}),
    ("gemma", "none", 3, {"lora__targets": ["q_proj", "down_proj"]}),
    ("mistral", "none", 2, {"lora__targets": "all-linear"}),
]


@dataclass(frozen=True)
class Made:
    """What the study computes, and what plain PEFT and the merged model do elsewhere."""

    live: NDArray[np.float32]
    plain: NDArray[np.float32]
    merged: NDArray[np.float32]
    base: NDArray[np.float32]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """Release all cases, and compute all of them in one process that has never heard of fedtune."""
    folder = tmp_path_factory.mktemp("elsewhere")
    results, jobs = [], []
    for number, (architecture, head, rank, changes) in enumerate(CASES):
        place = folder / str(number)
        live, three = _released(place, architecture, head, rank, dict(changes))
        results.append((live, [Path(job["result"]) for job in three]))
        jobs += three
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(__file__).with_name("elsewhere.py")
    done = subprocess.run(
        [sys.executable, "-I", str(script)],
        input=json.dumps(jobs), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Made(live, *(np.load(path) for path in paths)) for live, paths in results]


def _released(
    place: Path, architecture: str, head: str, rank: int, changes: dict[str, Any]
) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
    from tests.support.tiny import tiny_base

    tiny_base(place / "base", architecture, **changes.pop("base", {}))
    site = make_bench(place, architecture, head, **changes)
    adapter = at_rank(site, rank)
    save_adapter(place / "adapter", site.workspace, adapter, site.plan, summary_of(site.plan))
    base = open_base(Path(site.machine.model_folder))
    (place / "merged").mkdir()
    write_merged(site.plan, base, place / "adapter", place / "merged", PROMPTS, lambda _: None)
    workspace = open_released(site.plan, site.machine, rank)
    workspace.load(adapter)
    batch = collate(site.examples[:4], workspace.pad_id, site.plan.task.kind)
    model = workspace.peft if head == "pooled" else workspace.model
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    live = output.last_hidden_state if head == "pooled" else output.logits
    words = {"num_labels": 3, "pad_token_id": workspace.pad_id} if head == "architecture" else {}
    one = {"tokens": batch.input_ids.tolist(), "mask": batch.attention_mask.tolist(), "loader": LOADERS[head]}
    jobs = [
        {**one, "words": words, "base": str(folder), "adapter": adapter_folder, "result": str(place / f"{name}.npy")}
        for name, folder, adapter_folder in [
            ("plain", base.folder, str(place / "adapter")),
            ("merged", place / "merged", None),
            ("base", base.folder, None),
        ]
    ]
    return live.numpy(), jobs


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{name}-{head}-{rank}" for name, head, rank, _ in CASES])
def test_plain_peft_and_the_merged_model_have_the_logits_of_the_study(made: list[Made], number: int) -> None:
    found = made[number]
    assert np.allclose(found.plain, found.live, rtol=1e-5, atol=1e-5)
    assert np.allclose(found.merged, found.live, rtol=1e-4, atol=1e-5 * np.abs(found.live).max() + 1e-5)
    assert not np.allclose(found.base, found.live, rtol=1e-2, atol=1e-2)  # the adapter does something here


def test_peft_adapts_exactly_the_layers_that_were_trained(tmp_path: Path) -> None:
    """A pooler of the same name as an adapted layer, or a layer that was left out, stays as it is."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    from tests.support.tiny import tiny_base

    tiny_base(tmp_path / "base", "bert", num_hidden_layers=2)
    for number, words in enumerate(({"lora__layers": [1]}, {"lora__targets": ["dense"]}, {})):
        site: Bench = make_bench(tmp_path, "bert", "architecture", run__dir=str(tmp_path / f"run-{number}"), **words)
        save_adapter(tmp_path / "adapter", site.workspace, site.alive(), site.plan, summary_of(site.plan))
        config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
        model = site.workspace.peft.get_base_model()
        modules = [name for name, _ in model.named_modules() if "lora_" not in name and "base_layer" not in name]
        modules = [name for name in modules if ".modules_to_save" not in name and ".original_module" not in name]
        found = {name for name in modules if check_target_module_exists(config, name)}
        assert found == {b.layer.removeprefix("base_model.model.") for _, b in site.workspace.layout.pairs}
