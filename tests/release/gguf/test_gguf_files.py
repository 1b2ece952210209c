"""Metadata says what a consumer needs, a file is whole or absent, and progress ends where the file does."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ReleaseError
from fedtune.release.gguf import write_adapter_gguf, write_model_gguf
from tests.release.gguf import forward
from tests.release.gguf.conftest import Shelf
from tests.release.gguf.made import made_base


def keys_of(path: Path) -> dict[str, Any]:
    return forward.Opened(path).keys


def test_an_adapter_says_that_it_is_one(shelf: Shelf, tmp_path: Path) -> None:
    written = write_adapter_gguf(shelf.adapter("mistral"), shelf.base("mistral"), tmp_path / "a.gguf")
    keys = keys_of(written.path)
    assert (keys["general.type"], keys["adapter.type"], keys["general.architecture"]) == ("adapter", "lora", "llama")
    assert keys["adapter.lora.alpha"] == 12.0
    assert written.sha256 == hashlib.sha256(written.path.read_bytes()).hexdigest()
    assert written.size == written.path.stat().st_size


def test_a_window_that_llama_cpp_does_not_slide_limits_the_context(shelf: Shelf, tmp_path: Path) -> None:
    assert keys_of(write_model_gguf(shelf.base("mistral"), tmp_path / "m.gguf").path)["llama.context_length"] == 100
    keys = keys_of(write_model_gguf(shelf.base("gemma2"), tmp_path / "g.gguf").path)
    assert (keys["gemma2.context_length"], keys["gemma2.attention.sliding_window"]) == (128, 8)


def test_the_chat_template_and_the_ends_of_a_turn_travel_along(shelf: Shelf, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(shelf.base("gemma"), base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    keys = keys_of(write_model_gguf(base, tmp_path / "m.gguf").path)
    assert keys["tokenizer.chat_template"].startswith("{% for m in messages %}")
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (2, 1)
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_space_prefix"] is False


def test_progress_counts_every_byte_once(shelf: Shelf, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_model_gguf(shelf.base("gpt2"), tmp_path / "m.gguf", progress=lambda done, total: told.append((done, total)))
    done = [at for at, _ in told]
    assert done == sorted(set(done))
    assert done[-1] == told[-1][1]


def test_a_failure_half_way_leaves_nothing(shelf: Shelf, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_model_gguf(shelf.base("llama"), out / "m.gguf", progress=stop)
    assert list(out.iterdir()) == []


def test_a_failure_half_way_leaves_the_file_that_was_there(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("old")
    base = made_base(tmp_path / "base", "llama")
    _spoil(base, "model.norm.weight", float("nan"))
    with pytest.raises(ReleaseError, match=r"model\.norm\.weight holds NaN"):
        write_model_gguf(base, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "old"
    assert not list(tmp_path.glob("*.partial"))


def test_a_weight_beyond_half_precision_is_refused_not_made_infinite(tmp_path: Path) -> None:
    base = made_base(tmp_path / "base", "llama")
    _spoil(base, "model.layers.0.mlp.up_proj.weight", 7e4)
    with pytest.raises(ReleaseError) as caught:
        write_model_gguf(base, tmp_path / "m.gguf", "f16")
    assert (caught.value.code, "f32" in caught.value.hint) == ("release.out-of-range", True)
    assert write_model_gguf(base, tmp_path / "m.gguf", "f32").tensors > 0


def test_the_same_folder_gives_the_same_bytes(shelf: Shelf, tmp_path: Path) -> None:
    first = write_model_gguf(shelf.base("qwen2"), tmp_path / "1.gguf", name="one")
    assert write_model_gguf(shelf.base("qwen2"), tmp_path / "2.gguf", name="one").sha256 == first.sha256


def _spoil(base: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(base / "model.safetensors")
    state[name].view(-1)[3] = value
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
