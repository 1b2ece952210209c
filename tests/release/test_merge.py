"""A merged model is base plus adapter, in the base's own type, and is not called done before it was compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtune.errors import ReleaseError
from fedtune.model.base import content_hash
from fedtune.release.merge import base_dtype
from fedtune.release.parity import compare
from fedtune.release.verify import verify_release
from tests.support.bench import Bench, make_bench
from tests.support.releases import Ended, at_rank, make_ended
from tests.support.tiny import tiny_base


def ended(folder: Path, architecture: str = "llama", *, dtype: str = "float32", scale: float = 1.0) -> Ended:
    base = tiny_base(folder / "base", architecture)
    if dtype != "float32":
        _convert(base, getattr(torch, dtype))
    site: Bench = make_bench(folder, architecture, "none")
    adapter = {name: array * scale for name, array in at_rank(site, 2).items()}
    return make_ended(folder / "ended", site, adapter)


def _convert(base: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)


@pytest.mark.parametrize(("architecture", "transposed"), [("llama", False), ("gpt2", True)])
def test_every_adapted_weight_is_base_plus_update_and_no_other_changes(
    tmp_path: Path, architecture: str, transposed: bool
) -> None:
    study = ended(tmp_path, architecture)
    study.release(tmp_path / "merged", "merged")
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    adapter = load_file(study.run / "adapter" / "adapter_model.safetensors")
    changed = set()
    for name in (name for name in adapter if ".lora_A." in name):
        key = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        update = 2.0 * adapter[name.replace("lora_A", "lora_B")].double() @ adapter[name].double()
        expected = before[key].double() + (update.T if transposed else update)
        assert torch.allclose(after[key].double(), expected, atol=1e-6)
        changed.add(key)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - changed)


def test_the_folder_is_a_whole_model_with_tokenizer_card_and_signature(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    study = ended(tmp_path)
    done = study.release(tmp_path / "merged", "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("my card")["input_ids"] == study.bench.workspace.tokenizer("my card")["input_ids"]
    assert verify_release(tmp_path / "merged", coordinator_key=study.public).holds
    assert done.details["parity"]["error"] < 1e-5
    assert done.details["parity"]["effect"] > 1e-2
    assert "merged" in (tmp_path / "merged" / "README.md").read_text()
    assert content_hash(tmp_path / "merged") != study.bench.plan.model.sha256


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bases_own_type_is_kept_after_a_sum_in_float32(tmp_path: Path, dtype: str) -> None:
    study = ended(tmp_path, dtype=dtype)
    wanted = getattr(torch, dtype)
    study.release(tmp_path / "merged", "merged")
    assert base_dtype(tmp_path / "merged") == wanted
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    adapter = load_file(study.run / "adapter" / "adapter_model.safetensors")
    name = next(name for name in adapter if ".lora_A." in name)
    key = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
    exact = before[key].float() + 2.0 * (adapter[name.replace("lora_A", "lora_B")] @ adapter[name])
    assert torch.equal(after[key], exact.to(wanted))


def test_an_adapter_that_rounding_would_swallow_is_not_merged(tmp_path: Path) -> None:
    study = ended(tmp_path, dtype="bfloat16", scale=0.002)
    with pytest.raises(ReleaseError, match="little of it would be left") as caught:
        study.release(tmp_path / "merged", "merged")
    assert caught.value.code == "release.lost-in-rounding"
    assert "--to peft" in caught.value.hint
    assert not (tmp_path / "merged").exists()


def test_a_quantized_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    study = ended(tmp_path)
    plan = json.loads((study.run / "plan.json").read_text())
    plan["model"]["quantization"] = "4bit"
    from fedtune.config.plan import StudyPlan

    quantized = StudyPlan.model_validate(plan)
    (study.run / "plan.json").write_text(quantized.json_text)
    about = study.run / "adapter" / "fedtune.json"
    about.write_text(about.read_text().replace(study.bench.plan.sha256, quantized.sha256))
    with pytest.raises(ReleaseError) as caught:
        study.release(tmp_path / "merged", "merged")
    assert caught.value.code == "release.quantized-base"
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_comes_out_wrong_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that adds the transposed update to a square weight would, without any error of a shape."""
    study = ended(tmp_path)
    right = torch.Tensor.add_

    def wrong(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return right(self, other.T if other.shape[0] == other.shape[1] else other)

    monkeypatch.setattr(torch.nn.Parameter, "add_", wrong)
    with pytest.raises(ReleaseError, match="differs from base and adapter") as caught:
        study.release(tmp_path / "merged", "merged")
    assert caught.value.code == "release.not-equal"
    assert not (tmp_path / "merged").exists()


def test_a_nan_is_never_equal() -> None:
    live = [torch.ones(3, 4)]
    with pytest.raises(ReleaseError, match="differs"):
        compare(live, [torch.zeros(3, 4)], [torch.full((3, 4), torch.nan)], torch.bfloat16)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None) -> None:
    study = ended(tmp_path)
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ReleaseError) as caught:
        study.release(tmp_path / "merged", "merged", prompts=file)
    assert caught.value.code == "release.no-prompts"
    assert not (tmp_path / "merged").exists()
