"""One round at a site: Example → Batch → ClippedSum → NoisyGradient → adapter.

The round reads as that line. The sampler that draws the batches is the one whose rate the event states, an empty batch
is a step like any other, and the gradient is divided by the expected batch size of the site's public count of units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.config.plan import StudyPlan
from fedtune.data.batches import Batch, collate, filled
from fedtune.data.sampling import choose_records, physical_batches, sampler_of
from fedtune.data.shapes import ShapeRule, shaped_batches
from fedtune.data.templates import Example
from fedtune.data.units import Units
from fedtune.errors import PrivacyError
from fedtune.journal.ledger import Reservation
from fedtune.model.layout import AdapterLayout, AdapterState
from fedtune.model.workspace import Workspace
from fedtune.privacy.accounting import Event
from fedtune.privacy.clipping import ClippedSum, clip_and_sum
from fedtune.privacy.engines import PerSampleEngine, open_engine, summed_gradient
from fedtune.privacy.lora_layers import fused
from fedtune.privacy.noise import NoisyGradient, add_noise, mean_without_noise
from fedtune.privacy.random import RandomSource, SecureSource, SeededSource
from fedtune.privacy.units import unit_rows
from fedtune.training import optimizers
from fedtune.training.objective import losses
from fedtune.training.site_objective import Arrays, SiteObjective, Variates

OptimizerState = Arrays
Step = Callable[["_Drawn", RandomSource], tuple[NoisyGradient, int]]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a site does in one round: from which adapter, with which optimiser state, in which round (1-based).

    `reservation` is the ledger's proof that the round's event is on disk; it serves this one training.
    """

    site: str
    round: int
    adapter: AdapterState
    reservation: Reservation
    optimizer_state: OptimizerState = field(default_factory=dict)
    variates: Variates | None = None


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a site has after its local steps: the trained tensors to send, its optimiser state, and what it spent.

    `records_seen` counts records, `units_dropped` the units that were not finite; both stay at the site. `variate` is
    SCAFFOLD's cᵢ⁺ to keep, `variate_change` Δcᵢ to send.
    """

    state: AdapterState
    optimizer_state: OptimizerState
    event: Event | None
    records_seen: int
    units_dropped: int
    variate: Arrays = field(default_factory=dict)
    variate_change: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Round:
    """The fixed parts of one round at one site."""

    plan: StudyPlan
    workspace: Workspace
    examples: Sequence[Example]
    units: Units
    lengths: NDArray[np.int64]
    parameters: tuple[tuple[str, nn.Parameter], ...]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """One logical batch, cut into physical ones; `units` holds the unit of each record of each of them."""

    batches: Sequence[Batch]
    units: Sequence[NDArray[np.int64]]


def event_of_round(plan: StudyPlan) -> Event | None:
    """Return the event that one round of this plan costs: known before any record is read."""
    return None if plan.promise.mode == "off" else plan.promise.event(plan.training.local_steps)


def train_round(
    plan: StudyPlan,
    workspace: Workspace,
    examples: Sequence[Example],
    assignment: Assignment,
    layouts: tuple[AdapterLayout, AdapterLayout],
    units: Units | None = None,
) -> LocalResult:
    """Train one round; `layouts` are what is trained and what is sent, `units` says which examples are one unit.

    Without `units` each example is a unit. Deterministic in (plan, site, round, adapter, optimiser state) with seeded
    noise, on one machine and thread count. Errors: `ledger.not-reserved` when the ledger has reserved something else
    than this round costs, or the reservation has served before; `privacy.units` when `units` are not of these examples
    or the plan's unit is a column and there are none.
    """
    assignment.reservation.begin(plan.sha256, assignment.round, event_of_round(plan))
    trained, sent = layouts
    workspace.load({**workspace.initial, **assignment.adapter})
    parameters = workspace.train_only(trained)
    optimizer = optimizers.make_optimizer(plan.training, parameters, trained)
    optimizers.load_state(optimizer, parameters, assignment.optimizer_state)
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    this = _Round(plan, workspace, examples, _units(plan, units, len(examples)), lengths, parameters)
    objective = SiteObjective(plan, parameters, assignment.variates)
    seen, dropped = _steps(this, assignment, optimizer, objective)
    kept = optimizers.dump_state(optimizer, parameters) if plan.training.optimizer_state == "keep" else {}
    variate, change = objective.result()
    return LocalResult(workspace.export(sent), kept, event_of_round(plan), seen, dropped, variate, change)


def _steps(
    this: _Round, assignment: Assignment, optimizer: torch.optim.Optimizer, objective: SiteObjective
) -> tuple[int, int]:
    plan, seen, dropped = this.plan, 0, 0
    sampler = sampler_of(plan.promise.sampler, this.units.count, plan.promise.sampling_rate)
    source = _source(plan, assignment)
    with _gradients(this) as clipped_or_plain:
        for local, units in enumerate(sampler.draws(source, plan.training.local_steps)):
            drawn = _drawn(this, units, source)
            done = (assignment.round - 1) * plan.training.local_steps + local
            with this.workspace.dropout(source):
                gradient, lost = clipped_or_plain(drawn, source)
            factor = _rate_factor(plan, done, this.units.count)
            optimizers.step(optimizer, this.parameters, objective.of(gradient).mean, factor)
            seen, dropped = seen + sum(batch.records for batch in drawn.batches), dropped + lost
    return seen, dropped


def _rate_factor(plan: StudyPlan, step: int, units: int) -> float:
    """Return the factor on the learning rates at one step: made of public numbers only."""
    std = plan.promise.noise_multiplier * plan.promise.clip_norm / plan.promise.expected_batch(units)
    noise = optimizers.noise_factor(plan.training.noise_limit, std)
    return noise * optimizers.schedule_factor(plan.training.schedule, step, plan.total_steps)


def _source(plan: StudyPlan, assignment: Assignment) -> RandomSource:
    if plan.promise.noise == "secure" and plan.promise.mode == "dp":
        return SecureSource()
    return SeededSource("training", plan.seed, plan.sha256, assignment.site, assignment.round)


def _units(plan: StudyPlan, units: Units | None, records: int) -> Units:
    """Return the units of the plan's promise, and clip no others: each would have another sensitivity."""
    per_record = plan.promise.unit == "record"
    if units is None and per_record:
        return Units.each_record(records)
    if units is None or len(units.of_record) != records or (per_record and units.count != records):
        raise PrivacyError("units", f"the plan's unit is {plan.promise.unit}, and {records} records have no such units")
    return units


def _drawn(this: _Round, units: NDArray[np.int64], source: RandomSource) -> _Drawn:
    """Cut a logical batch into physical ones; none for an empty batch, so that no forward pass sees zero records."""
    plan, training = this.plan, this.plan.training
    records = choose_records(this.units, units, plan.promise.max_records_per_unit, source)
    if plan.has_fixed_shapes:
        expected = plan.promise.expected_batch(this.units.count) * (plan.promise.max_records_per_unit or 1)
        rule = ShapeRule(expected, training.physical_batch, training.physical_tokens, plan.data.max_tokens)
        shaped = shaped_batches(records, this.lengths, rule, this.units)
        groups = [group for group, _ in shaped]
        batches = [filled(_collated(this, group), shape, this.workspace.pad_id) for group, shape in shaped]
    else:
        limits = (training.physical_batch, training.physical_tokens)
        groups = physical_batches(records, this.lengths, *limits, this.units)
        batches = [_collated(this, group) for group in groups]
    device = this.workspace.device
    return _Drawn([batch.to(device) for batch in batches], [this.units.of_record[group] for group in groups])


def _collated(this: _Round, group: NDArray[np.int64]) -> Batch:
    return collate([this.examples[i] for i in group], this.workspace.pad_id, this.workspace.task.kind)


@contextmanager
def _gradients(this: _Round) -> Iterator[Step]:
    """Open the way from batches to a gradient: clipped and noisy, or plain for a study without privacy."""
    if this.plan.promise.mode == "off":
        with fused(this.workspace.model):
            yield lambda drawn, _source: (_plain(this, drawn), 0)
        return
    with open_engine(this.plan.promise.engine, this.workspace.model, this.parameters) as engine:
        yield lambda drawn, source: _private(this, engine, drawn, source)


def _private(this: _Round, engine: PerSampleEngine, drawn: _Drawn, source: RandomSource) -> tuple[NoisyGradient, int]:
    """Clip each unit, sum, add the plan's noise, divide by the expected batch size."""
    promise = this.plan.promise
    size = sum(parameter.numel() for _, parameter in this.parameters)
    clipped = ClippedSum.zero(size, promise.clip_norm, this.workspace.device)
    of_records = (
        engine.per_sample_gradients(losses(this.workspace, batch), batch.rows)[: batch.records]
        for batch in drawn.batches
    )
    for rows in unit_rows(of_records, drawn.units):
        clipped += clip_and_sum(rows, promise.clip_norm, promise.clipping)
    clipped = replace(clipped, total=engine.arrange(clipped.total))
    expected = promise.expected_batch(this.units.count)
    return add_noise(clipped, promise.noise_multiplier, source, expected), clipped.dropped


def _plain(this: _Round, drawn: _Drawn) -> NoisyGradient:
    """Sum plain gradients over the same batches, divided by the same expected batch size."""
    size = sum(parameter.numel() for _, parameter in this.parameters)
    total = torch.zeros(size, dtype=torch.float64, device=this.workspace.device)
    for batch in drawn.batches:
        total += summed_gradient(this.parameters, losses(this.workspace, batch), batch.records)
    return mean_without_noise(total, this.plan.promise.expected_batch(this.units.count))
