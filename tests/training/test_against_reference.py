"""A site's round equals a plain float64 loop over single records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fedtune.errors import PrivacyError
from tests.support.bench import CASES, Bench, make_bench
from tests.support.reference_round import distance, error, reference_round
from tests.support.tiny import tiny_base

if TYPE_CHECKING:
    from pathlib import Path

MakeBench = Callable[..., Bench]


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_a_private_round_equals_the_reference(bench: MakeBench, architecture: str, head: str) -> None:
    assert distance(bench(architecture, head)) < 1e-5


@pytest.mark.parametrize("algorithm", ["ffa", "fedsvd"])
def test_a_round_with_frozen_a_equals_the_reference(bench: MakeBench, algorithm: str) -> None:
    assert distance(bench("gpt2", "none").plan_with(aggregation__algorithm=algorithm), number=2) < 1e-5


@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("llama", "none")])
def test_a_round_without_privacy_equals_plain_summed_gradients(bench: MakeBench, architecture: str, head: str) -> None:
    site = bench(architecture, head).plan_with(privacy__mode="off")
    assert distance(site) < 1e-5
    assert site.round().event is None


@pytest.mark.parametrize(
    ("architecture", "head"), [("bert", "pooled"), ("deberta", "architecture"), ("gpt2", "none"), ("gemma", "none")]
)
def test_a_round_on_every_linear_layer_equals_the_reference(tmp_path: Path, architecture: str, head: str) -> None:
    assert distance(make_bench(tmp_path, architecture, head, lora__targets="all-linear")) < 1e-5


def test_a_deberta_that_shares_its_attention_keys_equals_the_reference(tmp_path: Path) -> None:
    """As DeBERTa v3 is published: its query layer serves all records at once, so `auto` leaves it alone."""
    tiny_base(tmp_path / "base", "deberta", share_att_key=True)
    assert distance(make_bench(tmp_path, "deberta")) < 1e-5


def test_control_its_query_layer_is_refused_before_a_round_and_not_booked_on_the_first_record(tmp_path: Path) -> None:
    tiny_base(tmp_path / "base", "deberta", share_att_key=True)
    with pytest.raises(PrivacyError, match=r"query_proj sees 1 rows.*flattened-records"):
        make_bench(tmp_path, "deberta", lora__targets=["query_proj"])


def test_the_head_has_its_own_learning_rate(bench: MakeBench) -> None:
    assert distance(bench().plan_with(training__head_learning_rate=3.0)) < 1e-5


@pytest.mark.parametrize("limit", [0.01, 10.0])
def test_above_the_noise_limit_the_rate_falls(bench: MakeBench, limit: float) -> None:
    assert distance(bench().plan_with(training__noise_limit=limit)) < 1e-5


@pytest.mark.parametrize("clipping", ["auto-s", "auto-v"])
@pytest.mark.parametrize("clip_norm", [0.1, 5.0])
def test_a_round_with_automatic_clipping_equals_the_reference(
    bench: MakeBench, clipping: str, clip_norm: float
) -> None:
    assert distance(bench().plan_with(privacy__clipping=clipping, privacy__clip_norm=clip_norm)) < 1e-5


def test_a_round_from_the_label_names_equals_the_reference(tmp_path: Path) -> None:
    changes = {"model__head_init": "labels", "model__head_center": "labels", "lora__init": "orthonormal"}
    assert distance(make_bench(tmp_path, model__head_scale=10.0, **changes)) < 1e-5


@pytest.mark.parametrize("mode", ["dp", "off"])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_physical_batch_does_not_change_the_round(bench: MakeBench, size: int, mode: str) -> None:
    """The plan's hash names the stream, so each size is compared with its own reference, which has no batches."""
    assert distance(bench().plan_with(training__physical_batch=size, privacy__mode=mode)) < 1e-5


# --- a NaN record ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A site one of whose records holds a token that the base model maps to NaN."""
    clean = make_bench(tmp_path_factory.mktemp("clean"))
    folder = tmp_path_factory.mktemp("poisoned")
    (folder / "base").mkdir()
    for path in (clean.machine.run.parent / "base").iterdir():
        (folder / "base" / path.name).write_bytes(path.read_bytes())
    bad = clean.workspace.tokenizer("~", add_special_tokens=False)["input_ids"][0]
    weights = load_file(folder / "base" / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][bad] = float("nan")
    save_file(weights, folder / "base" / "model.safetensors", {"format": "pt"})
    site = make_bench(folder, training__local_steps=4, training__sampling_rate=1.0)
    first = replace(site.examples[0], input_ids=np.append(site.examples[0].input_ids, bad).astype(np.int32))
    return replace(site, examples=[first, *site.examples[1:]])


def test_a_nan_record_contributes_zero_and_is_counted(poisoned: Bench) -> None:
    start = poisoned.alive()
    result = poisoned.round(adapter=start)
    assert result.units_dropped == 4  # once a step
    assert error(result.state, reference_round(poisoned, start), start) < 1e-5


def test_control_without_privacy_the_nan_record_poisons_the_update(poisoned: Bench) -> None:
    result = poisoned.plan_with(privacy__mode="off").round()
    assert np.isnan(result.state["head.weight"]).any()


def test_the_comparison_catches_the_exact_count_as_denominator(bench: MakeBench) -> None:
    """The denominator is made of the public count: two significant digits, not what the site holds."""
    site = bench()
    many = replace(site, examples=[site.examples[i % len(site.examples)] for i in range(123)])
    assert distance(many) < 1e-5
    start = many.alive()
    expected = reference_round(many, start)
    exact = {name: start[name] + (value - start[name]) * 120 / 123 for name, value in expected.items()}
    assert error(many.round(adapter=start).state, exact, start) > 1e-2
