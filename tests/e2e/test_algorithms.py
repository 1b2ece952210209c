"""Every aggregation algorithm in a whole study: what is released is what was learnt, and that is the mean."""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from fedtune.aggregation.lora.fedsb import core_name
from fedtune.aggregation.lora.registry import ALGORITHMS
from fedtune.data.batches import Batch, collate
from fedtune.release.adapter import HEAD_FILE, load_adapter
from fedtune.simulation.sites import dealt
from fedtune.simulation.workspace import open_workspace
from tests.support.whole import Federation, Trained, Workshop, dense, distance, workshop

Shop = Callable[..., Workshop]
GLOBAL = [name for name in ALGORITHMS if name != "fedsa"]
# The rules whose new update equals the mean of the sites' products, and how far float32 on the wire lets it be away.
EXACT = {"ffa": 1e-6, "rolora": 1e-6, "fedsvd": 1e-5, "flora": 1e-6, "fedex": 1e-6, "fedsb": 1e-6, "fedask": 1e-5}
modes = pytest.mark.parametrize("mode", ["dp", "off"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("algorithms")


@pytest.fixture
def shop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return lambda architecture="bert", head="pooled": workshop(tmp_path, monkeypatch, architecture, head, shared=folder)


def changes(name: str, mode: str) -> list[str]:
    return [f"aggregation.algorithm={name}", f"privacy.mode={mode}"]


def batch_of(study: Federation) -> Batch:
    workspace = open_workspace(study.plan, study.machine)
    examples = dealt(study.plan.json_text, study.machine, workspace.tokenizer).site(0).train[:5]
    return collate(examples, workspace.pad_id, workspace.task.kind)


def logits_of_the_state(study: Federation) -> Tensor:
    """Predict with the study's own model, from the coordinator's state as a site would hold it."""
    workspace = open_workspace(study.plan, study.machine)
    workspace.load({**workspace.initial, **study.merging.as_site_holds(study.state, study.plan.federation.rounds)})
    with torch.no_grad():
        return workspace.logits(batch_of(study)).clone()


def logits_of_the_release(study: Federation) -> Tensor:
    """Predict with transformers and peft alone, from the base's folder and the released one."""
    kinds = {
        "pooled": "AutoModel",
        "none": "AutoModelForCausalLM",
        "architecture": "AutoModelForSequenceClassification",
    }
    head, batch = study.plan.model.head, batch_of(study)
    extra = {"num_labels": len(study.plan.task.labels)} if head == "architecture" else {}
    base = getattr(transformers, kinds[head]).from_pretrained(
        study.machine.model_folder, local_files_only=True, **extra
    )
    model = PeftModel.from_pretrained(base, str(study.folder.adapter)).eval()
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        if head != "pooled":
            return output.logits
        return study.plan.model.head_scale * pooled_by_hand(output, batch, study.folder.adapter)


def pooled_by_hand(output: Any, batch: Batch, released: Path) -> Tensor:
    head, mask = load_file(released / HEAD_FILE), batch.attention_mask[..., None]
    embedding = nn.functional.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1))
    if "centre" in head:
        embedding = nn.functional.normalize(embedding - head["centre"])
    return embedding @ head["head.weight"].T


def released_update(study: Federation) -> dict[str, np.ndarray]:
    """Return (lora_alpha / r)·B·A of every layer of the released folder, as PEFT will compute it."""
    config = json.loads((study.folder.adapter / "adapter_config.json").read_text())
    adapter = load_adapter(study.folder.adapter)
    assert {adapter[A.name].shape[0] for A, _ in study.merging.layout.pairs} == {config["r"]}
    scale = config["lora_alpha"] / config["r"]
    assert scale == pytest.approx(study.scale, rel=1e-6)
    return {A.layer: scale * dense(adapter[A.name], adapter[B.name]) for A, B in study.merging.layout.pairs}


def mean_of_products(study: Federation, trained: dict[str, Trained]) -> dict[str, np.ndarray]:
    """Return s·Σ pᵢ·Bᵢ·Aᵢ of every layer by a loop over the sites, in float64, from what they trained."""
    total = sum(study.weights[site] for site in trained)
    found: dict[str, np.ndarray] = {}
    for spec_a, spec_b in study.merging.layout.pairs:
        found[spec_a.layer] = np.zeros((spec_b.shape[0], spec_a.shape[1]))
        for site, one in trained.items():
            core = one.state.get(core_name(spec_a.layer))
            b = one.state[spec_b.name] if core is None else dense(core, one.state[spec_b.name])
            found[spec_a.layer] += study.scale * study.weights[site] / total * dense(one.state[spec_a.name], b)
    return found


def assert_released_as_learnt(study: Federation) -> None:
    summary = study.folder.summary()
    assert summary is not None
    assert summary["released"] is True
    assert [site["failed"] for site in summary["sites"]] == [0] * len(summary["sites"])
    assert distance(released_update(study), study.update_of(study.state)) <= 1e-6
    state, release = logits_of_the_state(study), logits_of_the_release(study)
    open_workspace(study.plan, study.machine).load(study.merging.initial)  # the base as it was, for whoever is next
    assert torch.allclose(release, state, rtol=1e-5, atol=1e-5)
    untrained = open_workspace(study.plan, study.machine).logits(batch_of(study))
    assert not torch.allclose(untrained, state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", GLOBAL)
def test_a_study_releases_what_its_coordinator_has_learnt(shop: Shop, name: str) -> None:
    study = shop().make(*changes(name, "dp"))
    study.run()
    assert_released_as_learnt(study)


@pytest.mark.parametrize("name", ["ffa", "flora", "fedex", "fedsb", "fedask"])
def test_so_does_one_on_a_model_whose_weights_are_stored_transposed(shop: Shop, name: str) -> None:
    study = shop("gpt2", "none").make(*changes(name, "off"))
    study.run()
    assert_released_as_learnt(study)


@pytest.mark.slow
@modes
@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("bert", "pooled"),
        ("bert", "architecture"),
        ("deberta", "pooled"),
        ("gpt2", "pooled"),
        ("gpt2", "architecture"),
        ("llama", "none"),
    ],
)
def test_so_does_every_architecture_with_every_layer_adapted(
    shop: Shop, architecture: str, head: str, name: str, mode: str
) -> None:
    study = shop(architecture, head).make(*changes(name, mode), "lora.targets=all-linear", "federation.rounds=4")
    study.run()
    assert_released_as_learnt(study)


@pytest.mark.parametrize(
    "model",
    [
        ["dp", "bert", "pooled"],
        *(pytest.param(more, marks=pytest.mark.slow) for more in (["off", "bert", "pooled"], ["dp", "gpt2", "none"])),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("name", EXACT)
def test_the_update_of_a_round_is_the_mean_of_the_sites_products(shop: Shop, name: str, model: list[str]) -> None:
    """Each round on top of the base that its sites trained on: a rule that changes it adds this mean to it."""
    mode, *kind = model
    study = shop(*kind).make(*changes(name, mode), "federation.rounds=2")
    study.run()
    first, second = study.state_after(1), study.state_after(2)
    base = {layer: np.zeros(1) for layer in study.update_of(first)}
    for number, state in ((1, first), (2, second)):
        wanted = mean_of_products(study, study.trained_in(number))
        wanted = {layer: base[layer] + wanted[layer] for layer in wanted}
        assert distance(study.update_of(state), wanted) <= EXACT[name]
        base = base_of(study, state)


def base_of(study: Federation, state: Any) -> dict[str, np.ndarray]:
    """Return what the sites' base has on top of W0 after a state, at the study's scale: zero where it never changes."""
    holds = study.merging.as_site_holds(state, 1)
    found = {}
    for spec_a, spec_b in study.merging.layout.pairs:
        a, b = (holds.get(f"drift/{spec.name}") for spec in (spec_a, spec_b))
        found[spec_a.layer] = np.zeros(1) if a is None or b is None else study.scale * dense(a, b)
    return found


def test_the_mean_of_factors_is_not_that_mean_so_the_test_above_can_fail(shop: Shop) -> None:
    study = shop().make(*changes("fedit", "dp"), "federation.rounds=1")
    study.run()
    assert distance(study.update_of(study.state), mean_of_products(study, study.trained_in(1))) > 0.01


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_sites_train_on_the_base_that_the_rounds_before_have_made(shop: Shop, name: str) -> None:
    study = shop("gpt2", "none").make(*changes(name, "off"), "federation.rounds=3")
    study.run()
    state = study.state_after(2)
    for one in study.trained_in(3).values():
        held = {
            A.layer: study.scale
            * (
                dense(one.start[f"drift/{A.name}"], one.start[f"drift/{B.name}"])
                + dense(one.start[A.name], one.start[B.name])
            )
            for A, B in study.merging.layout.pairs
        }
        assert distance(held, study.update_of(state)) <= 1e-6


@pytest.mark.parametrize("name", ["rolora", "fedsvd", "fedsb", pytest.param("fedask", marks=pytest.mark.slow)])
def test_an_average_of_the_last_adapters_is_one_of_what_they_do(shop: Shop, name: str) -> None:
    """The nearest adapter of the plan's rank to the mean of the last two updates, whatever is in their factors."""
    study = shop().make(*changes(name, "dp"), "aggregation.average_last=2")
    study.run()
    one, other = (study.update_of(study.state_after(number)) for number in (2, 3))
    found = released_update(study)
    for layer in found:
        U, S, V = np.linalg.svd((one[layer] + other[layer]) / 2)
        assert np.allclose(found[layer], U[:, :2] * S[:2] @ V[:2], atol=1e-5 * S[0])


# --- what stays at the sites ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dp", pytest.param("off", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("words", "mine"),
    [
        (["aggregation.algorithm=fedsa"], "lora_B"),
        (["aggregation.algorithm=fedit", "aggregation.local_head=true"], "head"),
        (["aggregation.algorithm=flora", "aggregation.local_head=true"], "head"),
    ],
    ids=["fedsa", "local head", "local head beside flora"],
)
def test_what_stays_at_the_sites_is_not_released_and_each_site_is_measured_with_its_own(
    shop: Shop, words: list[str], mine: str, mode: str
) -> None:
    study = shop().make(*words, f"privacy.mode={mode}", "training.head_learning_rate=5")
    summary = study.run()
    assert summary["released"] is False
    assert not study.folder.adapter.exists()
    assert summary["metrics"]["measured_on"] != "test file"
    layout = study.merging.layout
    own = [spec.name for spec in layout.tensors if spec.role == mine]
    last = study.trained_in(study.plan.federation.rounds)
    for name in own:
        assert len({one.state[name].tobytes() for one in last.values()}) == len(last)
        assert all(name not in letter.instruction.adapter for letter in study.letters)
        assert all(name not in reply.update.state for reply in study.replies if hasattr(reply.update, "state"))
    for site in summary["sites"]:
        assert site["metrics"]["final"] == pytest.approx(own_metrics(study, last[site["name"]], own), rel=1e-5)


def own_metrics(study: Federation, one: Trained, own: list[str]) -> dict[str, float]:
    """Measure what the coordinator holds beside one site's own tensors on that site's held-out records."""
    from fedtune.training.evaluate import evaluate

    workspace = open_workspace(study.plan, study.machine)
    index = int(one.site.removeprefix("site-")) - 1
    examples = dealt(study.plan.json_text, study.machine, workspace.tokenizer).site(index).held_out
    holds = study.merging.as_site_holds(study.state, study.plan.federation.rounds)
    adapter = {**workspace.initial, **holds, **{name: one.state[name] for name in own}}
    return evaluate(workspace, adapter, examples, study.plan.evaluation.batch_size).metrics()


def test_a_site_goes_on_with_the_factor_that_it_has_kept(shop: Shop) -> None:
    study = shop().make(*changes("fedsa", "off"))
    study.run()
    for number in (2, 3):
        before, now = study.trained_in(number - 1), study.trained_in(number)
        for site, one in now.items():
            for spec_a, spec_b in study.merging.layout.pairs:
                assert np.array_equal(one.start[spec_b.name], before[site].state[spec_b.name])
                mean = sum(study.weights[name] * before[name].state[spec_a.name].astype(float) for name in before)
                assert np.allclose(one.start[spec_a.name], mean, rtol=1e-6, atol=1e-7)
