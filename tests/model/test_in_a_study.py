"""Precision and memory as a study says them: in the plan, in a site's round, in its evaluation, and refused early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config.compose import compose
from fedtune.config.plan import StudyPlan
from fedtune.errors import FedtuneError
from fedtune.simulation.resolve import resolve
from fedtune.training.evaluate import evaluate
from tests.support.bench import Bench, make_bench
from tests.support.runs import Study
from tests.support.tiny import bank_csv, tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("mode", ["dp", "off"])
@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("gpt2", "none")])
def test_a_round_with_checkpointing_is_the_same_round(tmp_path: Path, architecture: str, head: str, mode: str) -> None:
    """Also with dropout, whose masks come from the stream that draws batches and noise."""
    keys = {"training__gradient_checkpointing": True, "lora__dropout": 0.3, "privacy__mode": mode}
    site = make_bench(tmp_path, architecture, head, **keys)
    assert site.workspace.recomputed
    plain = replace(site, workspace=replace(site.workspace, recomputed=()))
    found, expected = site.round(), plain.round()
    assert found.records_seen > 0
    assert all(np.array_equal(found.state[name], expected.state[name]) for name in expected.state)


def test_a_round_under_autocast_is_nearly_the_same_round(tmp_path: Path) -> None:
    site = make_bench(tmp_path, "llama", "none", training__autocast="bfloat16", privacy__mode="off")
    exact = replace(site, workspace=replace(site.workspace, autocast=None))
    start = site.alive()
    found, expected = (moved(one, one.round(adapter=start).state, start) for one in (site, exact))
    assert 0 < np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    assert found.dtype == np.float32


def moved(site: Bench, state: Any, start: Any) -> Any:
    return np.concatenate([(state[name] - start[name]).ravel() for name in sorted(state)])


def test_evaluation_is_in_the_plans_precision(tmp_path: Path) -> None:
    site = make_bench(tmp_path, "bert", "pooled", training__autocast="bfloat16")
    exact = replace(site.workspace, autocast=None)
    losses = [evaluate(one, site.alive(), site.examples, 4).loss_sum for one in (site.workspace, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Study:
    tiny_base(tmp_path / "base", "llama")
    bank_csv(tmp_path / "bank.csv")
    return Study(tmp_path)


def planned(study: Study, *changes: str) -> StudyPlan:
    return resolve(compose(study.words(*changes))).plan


@pytest.mark.parametrize(
    "change", ["training.autocast=bfloat16", "training.gradient_checkpointing=true", "model.attention=eager"]
)
def test_the_plan_says_how_a_site_computes(study: Study, change: str) -> None:
    plan = planned(study, change)
    assert plan.sha256 != planned(study).sha256
    assert StudyPlan.from_json(plan.json_text) == plan


def test_the_plan_names_the_quantization_also_where_there_is_none(study: Study) -> None:
    assert planned(study).model.quantization == "none"
    assert planned(study).model.attention == "auto"


def refused(study: Study, *changes: str) -> FedtuneError:
    with pytest.raises(FedtuneError) as caught:
        planned(study, *changes)
    assert caught.value.hint
    return caught.value


def test_a_plan_for_a_quantized_base_is_refused_on_a_cpu(study: Study) -> None:
    error = refused(study, "model.quantization=4bit", "run.device=cpu")
    assert error.code == "model.quantization-device"


def test_opacus_and_checkpointing_are_refused_together(study: Study) -> None:
    error = refused(study, "privacy.engine=opacus", "training.gradient_checkpointing=true")
    assert error.code == "privacy.engine-checkpointing"
    assert "privacy.engine=lora" in error.hint
    planned(study, "privacy=off", "privacy.engine=opacus", "training.gradient_checkpointing=true")
