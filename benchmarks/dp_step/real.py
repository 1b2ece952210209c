"""The peers on real records: Poisson batches as a site draws them, of uneven lengths, cut as fedtune cuts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.dp_step.measure import compare
from benchmarks.dp_step.models import Subject, without_dropout
from benchmarks.dp_step.peers import Terms
from benchmarks.dp_step.registry import opened
from benchmarks.dp_step.studies import study, targets_of
from fedtune.config.plan import StudyPlan
from fedtune.data.batches import Batch, collate
from fedtune.data.sampling import PoissonSampler, physical_batches
from fedtune.data.templates import Example
from fedtune.model.workspace import Workspace
from fedtune.privacy.random import RandomSource, SeededSource
from fedtune.simulation.sites import dealt
from fedtune.simulation.workspace import open_workspace

Turn = tuple[list[Batch], float]


def real(settings: dict[str, Any]) -> dict[str, Any]:
    """Time all peers on one site's batches, each turn another batch, the same for all peers of the turn."""
    found = study(settings["data"], _overrides(settings))
    workspace = open_workspace(found.plan, found.machine)
    site = dealt(found.plan.json_text, found.machine, workspace.tokenizer).site(0)
    source, count = SeededSource("benchmark", "batches"), settings["warmup"] + settings["turns"]
    turns = list(drawn(found.plan, workspace, site.train, source, count))
    subject = Subject(without_dropout(workspace.model), workspace.task.kind)
    peers = opened(subject, Terms(noise=settings["noise"]), settings["peers"])
    compared = compare(peers, lambda turn: turns[turn], settings)
    measured = turns[settings["warmup"] :]
    records = sum(batch.records for batches, _ in measured for batch in batches)
    for figures in compared["peers"].values():
        if "failed" not in figures:
            figures["records_per_s"] = 1e3 * records / figures["total_ms"]
    return compared | {"batches": _described(measured)}


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [
        targets_of(settings["targets"]),
        f"data.limit={settings['rows']}",
        f"training.sampling_rate={settings['rate']}",
        f"training.physical_batch={settings['physical_batch']}",
        f"run.threads={settings['threads']}",
        f"run.device={settings['device']}",
    ]


def drawn(
    plan: StudyPlan, workspace: Workspace, examples: Sequence[Example], source: RandomSource, count: int
) -> Iterator[Turn]:
    """Draw logical batches and yield each, cut into physical batches, with the expected batch size."""
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    sampler = PoissonSampler(len(examples), plan.promise.sampling_rate)
    pad, kind = workspace.pad_id, workspace.task.kind
    for _ in range(count):
        groups = physical_batches(sampler.draw(source), lengths, plan.training.physical_batch)
        batches = [collate([examples[i] for i in group], pad, kind).to(workspace.device) for group in groups]
        yield batches, plan.promise.expected_batch(len(examples))


def _described(turns: list[Turn]) -> dict[str, float]:
    """Say how uneven the batches are: what share of their positions is padding."""
    batches = [batch for physical, _ in turns for batch in physical]
    records = sum(batch.records for batch in batches)
    positions = sum(batch.input_ids.numel() for batch in batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return {
        "records_a_step": records / len(turns),
        "physical_batches_a_step": len(batches) / len(turns),
        "tokens_a_record": tokens / records,
        "padding": 1 - tokens / positions,
    }
