from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dp_step import report
from benchmarks.dp_step.__main__ import main
from benchmarks.dp_step.configurations import TABLE, Configuration, quick, selected
from benchmarks.dp_step.costs import cost
from benchmarks.dp_step.measure import compare
from benchmarks.dp_step.models import Subject, build, random_batch, without_dropout
from benchmarks.dp_step.peers import PlainPeft, Terms
from benchmarks.dp_step.registry import PEERS
from benchmarks.dp_step.scaling import fitted_rate, points, predicted
from fedtune.data.batches import Batch, collate
from tests.support.bench import make_bench

ROOT = Path(__file__).parents[2]
PRIVATE = ["opacus_hooks", "opacus_ghost", "functorch"]
BY_NAME = {shape.name: shape for shape in TABLE}
FAMILIES = ["minilm-all-linear", "minilm-qv", "gpt2-all-linear", "llama-all-linear"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take seconds for these milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def moved(subject: Subject, peer: str, batches: Sequence[Batch], clip_norm: float = 1.0) -> Tensor:
    """How far a step at rate 1 takes the parameters: minus the mean gradient, as noise is as good as off."""
    twin = subject.twin()
    before = torch.cat([tensor.detach().flatten() for _, tensor in twin.parameters])
    terms = Terms(clip_norm=clip_norm, noise_multiplier=1e-9, learning_rate=1.0)
    PEERS[peer](twin, terms).step(batches, float(sum(batch.records for batch in batches)))
    return torch.cat([tensor.detach().flatten() for _, tensor in twin.parameters]) - before


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def cut(batch: Batch, at: int) -> list[Batch]:
    parts = [slice(None, at), slice(at, None)]
    return [Batch(batch.input_ids[part], batch.attention_mask[part], batch.labels[part]) for part in parts]


@cache
def small(name: str) -> tuple[Subject, Batch]:
    shape = quick(BY_NAME[name])
    return build(shape), random_batch(shape)


def test_the_quick_benchmark_ends_with_one_line_of_json_that_holds_the_promised_figures() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.dp_step", "--quick", "--format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratio_to_peft_nonprivate"] > 0
    assert result["ratio_to_fused_nonprivate"] > 0
    assert result["memory_ratio"] > 0
    (row,) = result["configurations"]
    assert set(row["time"]) == set(PEERS)
    assert all(figures["ms"] > 0 and figures["turns"] == 2 for figures in row["time"].values())
    low, high = result["spread"]["peft"]
    assert low <= result["ratio_to_peft_nonprivate"] <= high
    assert row["memory"]["fedtune"]["peak_mb"] > row["memory"]["fedtune"]["above_imports_mb"] > 0
    assert row["words"] in report.render(result, "markdown")


@pytest.mark.parametrize("clip_norm", [0.05, 100.0], ids=["every record clipped", "none clipped"])
@pytest.mark.parametrize("peer", PRIVATE)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_private_peer_takes_the_same_step_as_fedtune(name: str, peer: str, clip_norm: float) -> None:
    subject, batch = small(name)
    own = moved(subject, "fedtune", [batch], clip_norm)
    assert difference(moved(subject, peer, [batch], clip_norm), own) < 1e-4


def test_the_steps_that_are_compared_clip_every_record() -> None:
    subject, batch = small("minilm-all-linear")
    assert moved(subject, "peft", [batch]).norm() > 0.2
    assert moved(subject, "fedtune", [batch], clip_norm=0.05).norm() <= 0.05


@pytest.mark.parametrize("peer", ["peft", "fedtune", "fedtune_nonprivate", *PRIVATE])
def test_a_logical_batch_in_two_physical_ones_is_the_same_step(peer: str) -> None:
    subject, batch = small("minilm-all-linear")
    whole = moved(subject, peer, [batch], clip_norm=0.3)
    assert difference(moved(subject, peer, cut(batch, 3), clip_norm=0.3), whole) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_both_steps_without_privacy_are_the_same(name: str) -> None:
    subject, batch = small(name)
    assert difference(moved(subject, "fedtune_nonprivate", [batch]), moved(subject, "peft", [batch])) < 1e-4


@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("llama", "none")])
def test_the_private_peers_agree_on_uneven_records(architecture: str, head: str, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, architecture, head)
    workspace = bench.workspace
    workspace.load(bench.alive())
    by_length = sorted(bench.examples, key=lambda example: example.length)
    batch = collate([*by_length[:3], *by_length[-2:]], workspace.pad_id, workspace.task.kind)
    assert int(batch.attention_mask.min()) == 0
    subject = Subject(without_dropout(workspace.model), workspace.task.kind)
    own = moved(subject, "fedtune", [batch])
    assert max(difference(moved(subject, peer, [batch]), own) for peer in PRIVATE) < 1e-4


@pytest.mark.parametrize("peer", ["peft", "fedtune"])
@pytest.mark.parametrize("targets", ["qv", "all-linear"])
@pytest.mark.parametrize("name", ["minilm-all-linear", "gpt2-all-linear", "llama-all-linear"])
def test_the_cost_model_counts_what_torch_counts(name: str, targets: str, peer: str) -> None:
    shape = counted_shape(name, targets)
    subject, expected = build(shape), cost(shape)
    assert expected.parameters == sum(tensor.numel() for _, tensor in subject.parameters)
    assert expected.store_bytes == 4 * shape.batch * expected.parameters
    subject.model.get_base_model().set_attn_implementation("eager")  # torch counts no fused attention on a CPU
    step = PEERS[peer](subject, Terms()).step
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_operations}) as counter:
        step([random_batch(shape)], float(shape.batch))
    assert counter.get_total_flops() == pytest.approx(expected.operations, rel=0.02)


def in_place_operations(_sum: torch.Size, left: torch.Size, right: torch.Size, **_others: object) -> int:
    """torch counts addmm, but not the addmm_ that fedtune's layers use."""
    return 2 * left[0] * left[1] * right[1]


def counted_shape(name: str, targets: str) -> Configuration:
    kv_heads = 2 if name.startswith("llama") else None
    (shape,) = selected(BY_NAME[name].model, targets)[:1]  # type: ignore[arg-type]
    small = replace(shape, layers=2, width=64, heads=4, inner=96, batch=3, tokens=24, vocabulary=50)
    return replace(small, rank=5, kv_heads=kv_heads)


def test_the_fitted_rate_is_the_rate_of_measurements_that_follow_the_model() -> None:
    shapes = [shape for _, _, shape in points(TABLE[1], quick=False)]
    measured = [(shape, predicted(shape, 42e9)) for shape in shapes]
    assert fitted_rate(measured) == pytest.approx(42e9)


def test_a_peer_that_fails_is_named_with_its_error_and_stops_nobody() -> None:
    class Broken:
        def step(self, batches: Sequence[Batch], expected: float) -> None:
            raise NotImplementedError("no rule for this layer")

    subject, batch = small("minilm-qv")
    peers = {"peft": PlainPeft(subject.twin(), Terms()), "opacus_ghost": Broken(), "functorch": "RuntimeError: vmap"}
    settings = {"turns": 2, "warmup": 1, "device": "cpu"}
    found = compare(peers, lambda turn: ([batch], batch.records), settings)["peers"]
    assert found["peft"]["turns"] == 2
    assert found["opacus_ghost"] == {"failed": "NotImplementedError: no rule for this layer"}
    assert found["functorch"] == {"failed": "RuntimeError: vmap"}


def test_real_records_that_are_not_here_are_left_out_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDTUNE_DATA", str(tmp_path))
    main(["--real", "medquad"])
    assert "set FEDTUNE_DATA" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_large_shape_needs_a_gpu_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--large"])
    assert "no CUDA device" in capsys.readouterr().out
