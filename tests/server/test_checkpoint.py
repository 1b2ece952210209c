"""A checkpoint is whole or absent, of this plan or refused, and holds everything bit for bit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fedtune.aggregation.averaging import TailAverage
from fedtune.aggregation.lora.protocol import ServerState
from fedtune.aggregation.server_optimizers import OptimizerState
from fedtune.errors import FedtuneError, RunError
from fedtune.model.layout import AdapterLayout, TensorSpec
from fedtune_server.checkpoint import Checkpoint, latest_checkpoint, restore_average, save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.studies import TinyStudy

    MakeStudy = Callable[..., TinyStudy]

PLAN = "a" * 64
LAYOUT = AdapterLayout((TensorSpec("head", (3,), "head"), TensorSpec("layer/with/slashes", (2, 2), "head")))


def checkpoint(number: int) -> Checkpoint:
    draw = np.random.default_rng(number)
    adapter = {spec.name: draw.standard_normal(spec.shape).astype(np.float32) for spec in LAYOUT.tensors}
    moments = {f"momentum/{spec.name}": draw.standard_normal(spec.shape) for spec in LAYOUT.tensors}
    average = TailAverage(LAYOUT, 2)
    average.push(adapter)
    facts = {"seconds": 0.1 + number, "sites": [{"name": "bänk"}]}
    return Checkpoint(number, ServerState(adapter, OptimizerState(number, moments)), average.state(), facts)


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = checkpoint(3)
    save_checkpoint(tmp_path, PLAN, saved)
    found = latest_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert (found.round, found.facts) == (3, saved.facts)
    assert same(found.state.adapter, saved.state.adapter)
    assert found.state.optimizer.step == 3
    assert same(found.state.optimizer.moments, saved.state.optimizer.moments)
    average = TailAverage(LAYOUT, 2)
    restore_average(average, found)
    assert same(average.result(), saved.state.adapter)


def test_before_the_first_round_there_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path, PLAN) is None


def test_only_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 11):
        save_checkpoint(tmp_path, PLAN, checkpoint(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000010.safetensors", "round-000011.safetensors"]
    found = latest_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert found.round == 11


def test_a_file_half_written_when_the_process_died_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, PLAN, checkpoint(1))
    whole = (tmp_path / "round-000001.safetensors").read_bytes()
    (tmp_path / ".round-000002.safetensors.partial").write_bytes(whole[: len(whole) // 2])
    found = latest_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert found.round == 1


def test_a_checkpoint_cut_anywhere_is_refused_with_what_to_do(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, PLAN, checkpoint(1))
    save_checkpoint(tmp_path, PLAN, checkpoint(2))
    newest = tmp_path / "round-000002.safetensors"
    whole = newest.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        newest.write_bytes(whole[:length])
        with pytest.raises(RunError) as caught:
            latest_checkpoint(tmp_path, PLAN)
        assert caught.value.code == "run.damaged"
        assert newest.name in caught.value.hint
    newest.unlink()
    found = latest_checkpoint(tmp_path, PLAN)
    assert found is not None
    assert found.round == 1


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "round-000001.safetensors")
    with pytest.raises(RunError, match=r"run\.damaged"):
        latest_checkpoint(tmp_path, PLAN)


def test_another_plans_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "b" * 64, checkpoint(1))
    with pytest.raises(RunError) as caught:
        latest_checkpoint(tmp_path, PLAN)
    assert caught.value.code == "run.other-plan"


def test_a_study_whose_newest_checkpoint_is_lost_goes_on_from_the_one_before_to_the_same_end(
    make_study: MakeStudy,
) -> None:
    study, whole = make_study("federation.rounds=4"), make_study("federation.rounds=4")
    study.start()
    whole.start()
    study.folder.summary_file.unlink()
    (study.folder.checkpoints / "round-000004.safetensors").write_bytes(b"damaged")
    with pytest.raises(FedtuneError, match=r"run\.damaged"):
        study.go_on()
    (study.folder.checkpoints / "round-000004.safetensors").unlink()
    summary = study.go_on()
    assert summary["rounds"] == 4
    assert same(study.adapter(), whole.adapter())
    assert study.sites.asked[4] == whole.sites.asked[4] * 2
    assert [line["round"] for line in study.lines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_the_server_optimiser_and_the_average_go_on_where_they_were(make_study: MakeStudy, optimizer: str) -> None:
    settings = ("federation.rounds=4", f"aggregation.server_optimizer={optimizer}", "aggregation.average_last=3")
    study, whole = make_study(*settings), make_study(*settings)
    expected = whole.start()
    study.start()
    study.folder.summary_file.unlink()
    (study.folder.checkpoints / "round-000004.safetensors").unlink()
    found = study.go_on()
    assert same(study.adapter(), whole.adapter())
    adapters = [(one.folder.adapter / "adapter_model.safetensors").read_bytes() for one in (study, whole)]
    assert adapters[0] == adapters[1]
    assert json.dumps(found["metrics"]) == json.dumps(expected["metrics"])
