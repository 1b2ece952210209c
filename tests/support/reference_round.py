"""One round of DP-SGD written down plainly, in float64, one record at a time: what a site's round is judged against.

Shares nothing with the code it judges but the model, the examples and the seeded stream: it has its own loss, its own
gradients (autograd on one unpadded record), clipping, rounding of the record count, denominator and SGD.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedtune.privacy.random import SeededSource

if TYPE_CHECKING:
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
    private = plan.privacy["mode"] == "dp"
    for _ in range(plan.training.local_steps):
        drawn = np.flatnonzero(source.uniform(len(bench.examples)) < rate)
        rows = [_gradient(bench, model, bench.examples[index], trained) for index in drawn]
        if private:
            rows = [row * min(1.0, clip_norm / float(row.norm())) for row in rows if torch.isfinite(row).all()]
        total = sum(rows, torch.zeros(sum(tensor.numel() for tensor in trained), dtype=torch.float64))
        if private:
            total = total + torch.from_numpy(source.normal(len(total))) * sigma * clip_norm
        _descend(bench, dict(zip(names, trained, strict=True)), total / (rate * _two_digits(len(bench.examples))))
    return {name: parameters[name].detach().numpy() for name in names}


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
            batch = terms["sampling_rate"] * _two_digits(len(bench.examples))
            rate *= min(1.0, training.noise_limit * batch / (terms["noise_multiplier"] * terms["clip_norm"]))
        tensor.data = tensor.data - rate * gradient[offset : offset + tensor.numel()].view_as(tensor)
        offset += tensor.numel()


def _two_digits(count: int) -> int:
    """Round a count to two significant digits."""
    step: int = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return round(count / step) * step
