"""One private round on every architecture and head: what changes, what may not, and what another tool loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from fedtune.data.batches import Batch, collate
from fedtune.release.adapter import HEAD_FILE, load_adapter, save_adapter
from fedtune.training.evaluate import evaluate
from tests.support.bench import CASES, Bench, make_bench, summary_of

if TYPE_CHECKING:
    from pathlib import Path

every_case = pytest.mark.parametrize(("architecture", "head"), CASES)
one_of_each = pytest.mark.parametrize(
    ("architecture", "head"), [("bert", "pooled"), ("deberta", "architecture"), ("gpt2", "none"), ("llama", "none")]
)
MakeBench = Callable[..., Bench]


def batch_of(bench: Bench, records: int = 5) -> Batch:
    return collate(bench.examples[:records], bench.workspace.pad_id, bench.workspace.task.kind)


def logits_with(bench: Bench, adapter: Any) -> Tensor:
    bench.workspace.load(adapter)
    with torch.no_grad():
        return bench.workspace.logits(batch_of(bench))


def frozen_tensors(bench: Bench) -> dict[str, Tensor]:
    """Everything in the model but the adapter's own tensors, buffers included."""
    own = {id(parameter) for parameter in bench.workspace.parameters.values()}
    named = [*bench.workspace.model.named_parameters(), *bench.workspace.model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named if id(tensor) not in own}


@every_case
def test_every_adapted_layer_moves_and_no_frozen_tensor_does(bench: MakeBench, architecture: str, head: str) -> None:
    site = bench(architecture, head)
    evaluate(site.workspace, site.workspace.initial, site.examples[:4], 2)  # as a study does before its first round
    before = frozen_tensors(site)
    trained = site.whole(site.round())
    after = frozen_tensors(site)
    assert all(np.linalg.norm(trained[spec_b.name]) > 0 for _, spec_b in site.workspace.layout.pairs)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_case
def test_the_saved_adapter_is_the_live_one_and_plain_peft_predicts_the_same(
    bench: MakeBench, architecture: str, head: str, tmp_path: Path
) -> None:
    site = bench(architecture, head)
    trained = site.whole(site.round())
    live = logits_with(site, trained)
    save_adapter(tmp_path / "adapter", site.workspace, trained, site.plan, summary_of(site.plan))
    saved = load_adapter(tmp_path / "adapter")
    assert saved.keys() == trained.keys()
    assert all(np.array_equal(saved[name], trained[name]) for name in trained)
    assert torch.allclose(elsewhere(site, tmp_path / "adapter"), live, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits_with(site, site.workspace.initial), live, rtol=1e-3, atol=1e-4)


def elsewhere(site: Bench, released: Path) -> Tensor:
    """Predict with transformers and peft alone, from the base's folder and the released one."""
    kinds = {
        "pooled": "AutoModel",
        "none": "AutoModelForCausalLM",
        "architecture": "AutoModelForSequenceClassification",
    }
    extra = {"num_labels": len(site.plan.task.labels)} if site.plan.model.head == "architecture" else {}
    loader = getattr(transformers, kinds[site.plan.model.head])
    base = loader.from_pretrained(site.machine.model_folder, local_files_only=True, **extra)
    model = PeftModel.from_pretrained(base, str(released)).eval()
    batch = batch_of(site)
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return pooled_by_hand(output, batch, released) if site.plan.model.head == "pooled" else output.logits


def pooled_by_hand(output: Any, batch: Batch, released: Path) -> Tensor:
    head, mask = load_file(released / HEAD_FILE), batch.attention_mask[..., None]
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    embedding = nn.functional.normalize(mean)
    if "centre" in head:
        embedding = nn.functional.normalize(embedding - head["centre"])
    return embedding @ head["head.weight"].T


@pytest.mark.parametrize("algorithm", ["ffa", "fedsvd"])
@one_of_each
def test_a_frozen_a_is_neither_changed_nor_sent(bench: MakeBench, architecture: str, head: str, algorithm: str) -> None:
    site = bench(architecture, head).plan_with(aggregation__algorithm=algorithm)
    start = site.alive()
    result = site.round(adapter=start)
    live = site.workspace.export(site.workspace.layout)
    for spec_a, spec_b in site.workspace.layout.pairs:
        assert np.array_equal(live[spec_a.name], start[spec_a.name])
        assert spec_a.name not in result.state
        assert not np.array_equal(live[spec_b.name], start[spec_b.name])


@pytest.mark.parametrize(("architecture", "head"), [("llama", "none"), ("bert", "pooled")])
def test_a_bfloat16_base_stays_as_it_is_under_a_float32_adapter(tmp_path: Path, architecture: str, head: str) -> None:
    site = make_bench(tmp_path, architecture, head, model__dtype="bfloat16")
    before = frozen_tensors(site)
    result = site.round(adapter=site.alive())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen_tensors(site).items())
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in result.state.values())
    assert result.units_dropped == 0
    trained = site.whole(result)
    save_adapter(tmp_path / "adapter", site.workspace, trained, site.plan, summary_of(site.plan))
    saved = load_adapter(tmp_path / "adapter")
    assert all(np.array_equal(saved[name], trained[name]) for name in trained)


def test_fedit_trains_a_as_well(bench: MakeBench) -> None:
    site = bench()
    start = site.alive()
    result = site.round(adapter=start)
    assert all(not np.array_equal(result.state[spec.name], start[spec.name]) for spec, _ in site.workspace.layout.pairs)


@every_case
def test_a_record_is_seen_alike_alone_and_beside_longer_ones(bench: MakeBench, architecture: str, head: str) -> None:
    """What pads a batch must not reach a record's logits, or one record's length would be in another's gradient."""
    site = bench(architecture, head)
    site.workspace.load(site.alive())
    short, long = (sorted(site.examples, key=lambda one: len(one.input_ids))[at] for at in (0, -1))
    assert len(short.input_ids) < len(long.input_ids)
    with torch.no_grad():
        alone, beside = (
            site.workspace.logits(collate(group, site.workspace.pad_id, site.workspace.task.kind))[0]
            for group in ([short], [short, long])
        )
    shown = slice(0, len(short.input_ids)) if head == "none" else slice(None)
    assert torch.allclose(alone, beside[shown], rtol=1e-4, atol=1e-5)
