"""One round of DP-SGD written down plainly, in float64, one record at a time: what a site's round is judged against.

Shares nothing with the code it judges but the model, the examples, who owns them and the seeded stream: it has its own
loss, its own gradients (autograd on one unpadded record), choice of a unit's records, clipping, rounding of the number
of units, denominator and SGD.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedtune.privacy.random import SeededSource

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from fedtune.data.templates import Example
    from fedtune.model.layout import AdapterState
    from tests.support.bench import Bench


def reference_round(bench: Bench, adapter: AdapterState, number: int = 1) -> dict[str, NDArray[np.float64]]:
    """Return every trained tensor after one round of plain SGD from `adapter`."""
    plan, names = bench.plan, bench.layouts[0].names
    model = copy.deepcopy(bench.workspace.model).double().eval()
    parameters = _parameters(bench, model, adapter)
    trained = [parameters[name] for name in names]
    source = SeededSource("training", plan.seed, plan.sha256, bench.name, number)
    sigma, clip_norm, rate = (plan.privacy[key] for key in ("noise_multiplier", "clip_norm", "sampling_rate"))
    dealt: NDArray[np.float64] = np.empty(0)
    private, units = plan.privacy["mode"] == "dp", _units(bench)
    for step in range(plan.training.local_steps):
        if plan.privacy["sampler"] == "poisson":
            drawn = np.flatnonzero(source.uniform(len(units)) < rate)
        else:
            parts = round(1 / rate)
            dealt = np.floor(source.uniform(len(units)) * parts) if step % parts == 0 else dealt
            drawn = np.flatnonzero(dealt == step % parts)
        used = [_used(units[at], plan.privacy["max_records_per_unit"], source) for at in drawn]
        rows = [_summed([_gradient(bench, model, bench.examples[at], trained) for at in records]) for records in used]
        if private:
            rows = [row * _scale(plan.privacy, float(row.norm())) for row in rows if torch.isfinite(row).all()]
        total = sum(rows, torch.zeros(sum(tensor.numel() for tensor in trained), dtype=torch.float64))
        if private:
            total = total + torch.from_numpy(source.normal(len(total))) * sigma * clip_norm
        _descend(bench, dict(zip(names, trained, strict=True)), total / (rate * _two_digits(len(units))))
    return {name: parameters[name].detach().numpy() for name in names}


def error(found: AdapterState, expected: dict[str, NDArray[np.float64]], start: AdapterState) -> float:
    """Return how far apart two rounds end, relative to how far the second moved."""
    assert found.keys() == expected.keys()
    apart = sum(float(np.square(found[name] - expected[name]).sum()) for name in expected)
    moved = sum(float(np.square(start[name] - expected[name]).sum()) for name in expected)
    return float(np.sqrt(apart / moved))


def distance(bench: Bench, number: int = 1) -> float:
    """Return how far a round of the site ends from the reference."""
    start = bench.alive()
    return error(bench.round(number, start).state, reference_round(bench, start, number), start)


def _scale(terms: Mapping[str, Any], norm: float) -> float:
    """Return what a gradient of this norm is multiplied with."""
    return {
        "fixed": min(1.0, terms["clip_norm"] / max(norm, 1e-30)),
        "auto-s": terms["clip_norm"] / (norm + 0.01),
        "auto-v": terms["clip_norm"] / max(norm, 1e-30),
    }[terms["clipping"]]


def _units(bench: Bench) -> list[list[int]]:
    """List the records of each unit."""
    owner = range(len(bench.examples)) if bench.units is None else bench.units.of_record.tolist()
    return [[at for at, unit in enumerate(owner) if unit == wanted] for wanted in sorted(set(owner))]


def _used(records: list[int], at_most: int | None, source: SeededSource) -> list[int]:
    """Take the records of the smallest draws, one draw a record, if a unit has too many."""
    if at_most is None or len(records) <= at_most:
        return records
    return [record for _, record in sorted(zip(source.uniform(len(records)), records, strict=True))[:at_most]]


def _summed(gradients: list[Tensor]) -> Tensor:
    return torch.stack(gradients).sum(0)


def _parameters(bench: Bench, model: torch.nn.Module, adapter: AdapterState) -> dict[str, torch.nn.Parameter]:
    """Find the copy's parameters by the identity of the originals, and set them to the adapter."""
    pairs = zip(bench.workspace.model.parameters(), model.parameters(), strict=True)
    twin = {id(original): copied for original, copied in pairs}
    found = {name: twin[id(tensor)] for name, tensor in bench.workspace.parameters.items()}
    for name, tensor in found.items():
        tensor.data = torch.from_numpy(np.asarray(adapter[name], dtype=np.float64).copy())
        tensor.requires_grad_(True)
    return found


def _gradient(bench: Bench, model: torch.nn.Module, example: Example, trained: list[torch.nn.Parameter]) -> Tensor:
    logits = _logits(bench, model, torch.tensor(example.input_ids.tolist())[None])
    gradients = torch.autograd.grad(_loss(logits, example), trained, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, trained, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def _logits(bench: Bench, model: Any, ids: Tensor) -> Tensor:
    """Return the logits of one record; the pooled head is W·e over the normalised mean of the last hidden states."""
    mask = torch.ones_like(ids)
    if bench.workspace.model is bench.workspace.peft:
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits[0]
        return logits
    mean = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state[0].mean(0)
    embedding = mean / mean.norm()
    if bench.workspace.model.centre is not None:
        embedding = embedding - bench.workspace.model.centre.double()
        embedding = embedding / embedding.norm()
    scores: Tensor = model.head.weight @ embedding
    return scores * bench.plan.model.head_scale


def _loss(logits: Tensor, example: Example) -> Tensor:
    """-log p of the class, or the mean of -log p over the tokens that count."""
    if example.labels is None:
        return torch.logsumexp(logits, -1) - logits[int(example.target or 0)]
    at = [t for t in range(1, len(example.labels)) if example.labels[t] != -100]
    each = [torch.logsumexp(logits[t - 1], -1) - logits[t - 1, int(example.labels[t])] for t in at]
    return torch.stack(each).mean()


def _descend(bench: Bench, trained: dict[str, torch.nn.Parameter], gradient: Tensor) -> None:
    training, offset = bench.plan.training, 0
    for name, tensor in trained.items():
        is_factor = ".lora_A." in name or ".lora_B." in name
        rate = training.learning_rate if is_factor else (training.head_learning_rate or training.learning_rate)
        if training.noise_limit is not None:
            terms = bench.plan.privacy
            batch = terms["sampling_rate"] * _two_digits(len(_units(bench)))
            rate *= min(1.0, training.noise_limit * batch / (terms["noise_multiplier"] * terms["clip_norm"]))
        tensor.data = tensor.data - rate * gradient[offset : offset + tensor.numel()].view_as(tensor)
        offset += tensor.numel()


def _two_digits(count: int) -> int:
    """Round a count to two significant digits."""
    step: int = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return round(count / step) * step
