"""What leaves a study: readable elsewhere, equal to what was trained, and without a trace of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file, save

from fedtune.data.batches import collate
from fedtune.errors import ModelError, RunError
from fedtune.release.adapter import load_adapter, save_adapter
from tests.support.bench import Bench, summary_of
from tests.support.releases import at_rank

if TYPE_CHECKING:
    from fedtune.model.layout import AdapterState


def release(site: Bench, folder: Path, adapter: AdapterState | None = None) -> Path:
    save_adapter(folder, site.workspace, adapter or site.alive(), site.plan, summary_of(site.plan, accuracy=0.5))
    return folder


def test_the_folder_holds_peft_files_head_card_and_facts(pooled: Bench, tmp_path: Path) -> None:
    folder = release(pooled, tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "fedtune.json",
        "README.md",
    }


def test_a_language_model_needs_no_head_file(language: Bench, tmp_path: Path) -> None:
    assert not (release(language, tmp_path / "adapter") / "head.safetensors").exists()


def test_what_is_read_back_is_what_was_released(pooled: Bench, tmp_path: Path) -> None:
    adapter = pooled.alive()
    saved = load_adapter(release(pooled, tmp_path / "adapter", adapter))
    assert saved.keys() == adapter.keys()
    assert all(np.array_equal(saved[name], adapter[name]) for name in adapter)


@pytest.mark.parametrize(("rank", "alpha"), [(5, 4.0), (1, 4.0), (3, 1.3), (2, 0.37)])
def test_an_adapter_of_another_rank_is_the_same_update_in_peft_and_when_read_back(
    pooled: Bench, tmp_path: Path, rank: int, alpha: float
) -> None:
    """Stacking rules end with a rank of their own: (lora_alpha / r)·B·A as saved is s·B·A of the study."""
    site = pooled.plan_with(lora__alpha=alpha)
    adapter = at_rank(site, rank)
    folder = release(site, tmp_path / "adapter", adapter)
    config = LoraConfig.from_pretrained(str(folder))
    tensors, back = load_file(folder / "adapter_model.safetensors"), load_adapter(folder)
    assert config.r == rank
    for spec_a, spec_b in site.workspace.layout.pairs:
        live = alpha / 2 * adapter[spec_b.name].astype(np.float64) @ adapter[spec_a.name]
        saved = config.lora_alpha / config.r * tensors[spec_b.name].astype(np.float64) @ tensors[spec_a.name]
        assert np.allclose(saved, live, rtol=1e-6, atol=1e-7)
        assert np.allclose(back[spec_b.name], adapter[spec_b.name], rtol=1e-6)
        assert np.array_equal(back[spec_a.name], adapter[spec_a.name])


def test_head_and_centre_are_enough_to_predict_without_fedtune(pooled: Bench, tmp_path: Path) -> None:
    folder = release(pooled, tmp_path / "adapter")
    head = load_file(folder / "head.safetensors")
    pooled.workspace.load(pooled.alive())
    batch = collate(pooled.examples[:4], pooled.workspace.pad_id, "classification")
    with torch.no_grad():
        logits = pooled.workspace.logits(batch).numpy()
        hidden = pooled.workspace.peft(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    mask = batch.attention_mask.numpy()[..., None]
    mean = (hidden.last_hidden_state.numpy() * mask).sum(1) / mask.sum(1)
    centred = mean / np.linalg.norm(mean, axis=1, keepdims=True) - head["centre"]
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True) @ head["head.weight"].T
    assert np.allclose(logits, expected, atol=1e-5)


def test_no_file_names_a_place_of_this_machine(pooled: Bench, language: Bench, tmp_path: Path) -> None:
    for number, site in enumerate((pooled, language)):
        folder = release(site, tmp_path / f"adapter-{number}")
        places = {str(tmp_path), str(Path(site.machine.model_folder).parent), str(Path.cwd()), str(Path.home())} - {"/"}
        for path in folder.iterdir():
            content = path.read_bytes()
            assert not [place for place in places if place.encode() in content], path.name


def test_the_configuration_is_plain_peft_and_names_the_base_as_the_plan_does(pooled: Bench, tmp_path: Path) -> None:
    folder = release(pooled, tmp_path / "adapter")
    config = LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, config.bias) == (2, 4, "none")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert type(written["lora_alpha"]) is int
    assert written["target_modules"] == ["query", "value"]
    assert config.base_model_name_or_path == pooled.plan.model.name
    assert config.inference_mode


def test_the_facts_identify_plan_task_and_base(pooled: Bench, tmp_path: Path) -> None:
    about = json.loads((release(pooled, tmp_path / "adapter") / "fedtune.json").read_text())
    assert about["plan_sha256"] == pooled.plan.sha256
    assert about["task"] == pooled.plan.data.task
    assert about["base"]["sha256"] == pooled.plan.model.sha256


def test_a_release_overwrites_an_older_one_whole(pooled: Bench, tmp_path: Path) -> None:
    """As when a study is resumed that died while it released."""
    release(pooled, tmp_path / "adapter", pooled.alive(seed=1))
    newer = pooled.alive(seed=2)
    saved = load_adapter(release(pooled, tmp_path / "adapter", newer))
    assert all(np.array_equal(saved[name], newer[name]) for name in newer)


def test_saving_asks_nobody_about_the_base(pooled: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default peft asks the Hub whether the base's vocabulary has grown; a site must not name its model there."""

    def asked(*args: Any, **kwargs: Any) -> None:
        pytest.fail(f"the network was asked for {args}")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    monkeypatch.setattr("socket.socket.connect", asked)
    release(pooled, tmp_path / "adapter")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_adapter_that_never_moved_is_refused(pooled: Bench, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.dead-adapter") as caught:
        release(pooled, tmp_path / "adapter", pooled.workspace.initial)
    assert caught.value.hint
    assert not (tmp_path / "adapter").exists()


def test_a_head_may_have_learnt_alone_without_privacy_but_not_under_noise(pooled: Bench, tmp_path: Path) -> None:
    """Noise moves every B, so a private B at zero was never trained; without noise a head may leave it nothing."""
    adapter = {**pooled.workspace.initial, "head.weight": pooled.workspace.initial["head.weight"] + 1}
    with pytest.raises(ModelError, match=r"model\.dead-adapter"):
        release(pooled, tmp_path / "private", adapter)
    release(pooled.plan_with(privacy__mode="off"), tmp_path / "off", adapter)
    with pytest.raises(ModelError, match=r"model\.dead-adapter"):
        release(pooled.plan_with(privacy__mode="off"), tmp_path / "still", pooled.workspace.initial)


def test_a_library_that_saves_other_numbers_is_noticed(
    pooled: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one pair of Opacus and PEFT versions did, which trained and saved an adapter that was dead."""

    def stale(tensors: dict[str, Any], **options: Any) -> bytes:
        return save({name: tensor * 0 for name, tensor in tensors.items()}, **options)

    monkeypatch.setattr("fedtune.release.adapter.save", stale)
    with pytest.raises(ModelError, match=r"model\.not-saved"):
        release(pooled, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_leaves_tensors_out_is_noticed(
    pooled: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.release.adapter.save", lambda tensors, **_: save(dict(list(tensors.items())[1:])))
    with pytest.raises(ModelError, match=r"model\.not-saved"):
        release(pooled, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_release_that_dies_leaves_the_earlier_one_or_nothing(
    pooled: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any, **words: Any) -> str:
        raise KeyboardInterrupt

    folder, old = tmp_path / "adapter", pooled.alive(seed=1)
    monkeypatch.setattr("fedtune.release.adapter.render_card", killed)
    with pytest.raises(KeyboardInterrupt):
        release(pooled, folder)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    release(pooled, folder, old)
    monkeypatch.setattr("fedtune.release.adapter.render_card", killed)
    with pytest.raises(KeyboardInterrupt):
        release(pooled, folder, pooled.alive(seed=2))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert all(np.array_equal(load_adapter(folder)[name], old[name]) for name in old)


@pytest.mark.parametrize("change", ["missing", "ragged", "unknown"])
def test_an_adapter_that_is_not_of_the_layers_is_refused(pooled: Bench, tmp_path: Path, change: str) -> None:
    adapter = dict(pooled.alive())
    name = next(name for name in adapter if name.endswith("lora_B.weight"))
    if change == "missing":
        adapter = {**at_rank(pooled, 5), name: adapter[name]}
    elif change == "ragged":
        adapter[name] = adapter[name][:-1]
    else:
        adapter["base_model.model.other.lora_B.weight"] = adapter[name]
    with pytest.raises(ModelError, match=r"model\.(wrong-shape|unknown-tensor)"):
        release(pooled, tmp_path / "adapter", adapter)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"not safetensors"])
def test_a_folder_without_a_whole_adapter_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=r"run\.no-adapter"):
        load_adapter(tmp_path)


def test_a_place_that_cannot_be_written_is_named(pooled: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="file"):
        release(pooled, tmp_path / "file" / "adapter")
