"""The real llama.cpp loads our files and says what transformers and PEFT say.

Needs a Python with llama-cpp-python, this one or the one that FEDTUNE_LLAMA_PYTHON names (docs/gguf.md).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedtune.release.gguf import write_adapter_gguf, write_model_gguf
from tests.release.gguf.conftest import Shelf
from tests.release.gguf.made import FAMILIES, adapted_model, greedy_of, logits_of, made_adapter
from tests.support.runs import MODELS

WORKER = Path(__file__).parent / "llama_worker.py"
PYTHON = os.environ.get("FEDTUNE_LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
STORIES = MODELS / "stories260k"
PROMPTS = (
    "Once upon a time", "Lily went to the park", "The dog said", "One day, Tom", "Mom was happy because", "It was a",
    "There was a big red ball", '"Can I play?" asked', "The sun was hot and", "Tim and Sue", "A little bird",
    "He ran to the tree.", "In the morning", "Her friend Ben", "They saw a cat", "The box was", "Dad told him to",
    "Anna wanted a new", "At night", "The end of the story",
)  # fmt: skip
TEXTS = ("Once upon a time there was", "  120/80  won't\n\nrise\t!", "é 你好 🦙 I'LL 12345", "Überweisung naïve café")
STEPS = 64
# Largest difference of a logit. Activations of GELU come from a half-precision table in llama.cpp.
EXACT = {"llama": 3e-5, "llama3": 3e-5, "mistral": 3e-5, "qwen2": 3e-5, "gemma": 5e-3, "gemma2": 5e-3, "gpt2": 5e-3}
# Root mean square of the logits' error, in standard deviations of the logits; q8_0 rounds activations too.
ROUNDED = {"f16": 0.005, "q8_0": 0.06}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="no llama-cpp-python: see docs/gguf.md, Checking with llama.cpp"),
]
stories = pytest.mark.skipif(not STORIES.exists(), reason="no model stories260k; set FEDTUNE_MODELS")


def answered(folder: Path, **request: Any) -> Any:
    """Ask the real llama.cpp in a process of its own."""
    asked, told = folder / "request.json", folder / "answer.npz"
    asked.write_text(json.dumps({key: value for key, value in request.items() if value is not None}))
    done = subprocess.run(
        [str(PYTHON), str(WORKER), str(asked), str(told)], capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    return np.load(told)


def rounding(found: Any, wanted: Any) -> float:
    return float(np.sqrt(((found - wanted) ** 2).mean()) / wanted.std())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_adapter(tmp_path_factory.mktemp("stories") / "adapter", STORIES)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    adapted_model(STORIES, adapter).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


@stories
@pytest.mark.parametrize("whole", [False, True], ids=["base and adapter", "merged"])
def test_greedy_continuations_are_identical_token_for_token(
    whole: bool, adapter: Path, merged: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = write_model_gguf(merged if whole else STORIES, tmp_path / "m.gguf", "f32")
    lora = None if whole else str(write_adapter_gguf(adapter, STORIES, tmp_path / "a.gguf", "f32").path)
    told = answered(tmp_path, model=str(model.path), lora=lora, prompts=prompts, steps=STEPS)
    wanted = adapted_model(STORIES, adapter)
    for at, ids in enumerate(prompts):
        assert told[f"greedy_{at}"].tolist() == greedy_of(wanted, ids, STEPS)
        assert np.abs(told[f"logits_{at}"] - logits_of(wanted, ids)).max() < 1e-4
    plain = adapted_model(STORIES)
    assert any(told[f"greedy_{at}"].tolist() != greedy_of(plain, ids, STEPS) for at, ids in enumerate(prompts))


@stories
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("whole", [False, True], ids=["base and adapter", "merged"])
def test_shorter_numbers_stay_within_their_error(
    dtype: str, whole: bool, adapter: Path, merged: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = write_model_gguf(merged if whole else STORIES, tmp_path / "m.gguf", dtype)
    lora = None if whole else str(write_adapter_gguf(adapter, STORIES, tmp_path / "a.gguf", dtype).path)
    told = answered(tmp_path, model=str(model.path), lora=lora, prompts=prompts, steps=1)
    wanted = adapted_model(STORIES, adapter)
    errors = [rounding(told[f"logits_{at}"], logits_of(wanted, ids)) for at, ids in enumerate(prompts)]
    assert max(errors) < ROUNDED[dtype]


@stories
def test_texts_become_the_tokens_of_training(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = write_model_gguf(STORIES, tmp_path / "m.gguf", "f16")
    told = answered(tmp_path, model=str(model.path), texts=[*PROMPTS, *TEXTS])
    for at, text in enumerate((*PROMPTS, *TEXTS)):
        assert told[f"ids_{at}"].tolist() == tokenizer(text)["input_ids"], text
    assert np.flatnonzero(told["end"]).tolist() == [1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_computes_what_peft_computes(family: str, shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base(family), shelf.adapter(family)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    model = write_model_gguf(base, tmp_path / "m.gguf", "f32")
    lora = write_adapter_gguf(adapter, base, tmp_path / "a.gguf", "f32")
    told = answered(
        tmp_path, model=str(model.path), lora=str(lora.path), prompts=ids, steps=16, texts=TEXTS, context=96
    )
    wanted = adapted_model(base, adapter)
    for at, prompt in enumerate(ids):
        assert told[f"ids_{at}"].tolist() == prompt
        assert np.abs(told[f"logits_{at}"] - logits_of(wanted, prompt)).max() < EXACT[family]
        if EXACT[family] < 1e-4:
            assert told[f"greedy_{at}"].tolist() == greedy_of(wanted, prompt, 16)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_in_shorter_numbers(family: str, dtype: str, shelf: Shelf, tmp_path: Path) -> None:
    base, adapter = shelf.base(family), shelf.adapter(family)
    ids = [AutoTokenizer.from_pretrained(base)(text)["input_ids"] for text in TEXTS]
    model = write_model_gguf(base, tmp_path / "m.gguf", dtype)
    lora = write_adapter_gguf(adapter, base, tmp_path / "a.gguf", dtype)
    told = answered(tmp_path, model=str(model.path), lora=str(lora.path), prompts=ids, steps=1)
    wanted = adapted_model(base, adapter)
    errors = [rounding(told[f"logits_{at}"], logits_of(wanted, prompt)) for at, prompt in enumerate(ids)]
    assert max(errors) < ROUNDED[dtype]
