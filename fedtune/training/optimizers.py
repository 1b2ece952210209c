"""The site's optimiser: torch's own SGD and AdamW over the adapter, with the plan's schedule.

Its state travels nowhere; with `optimizer_state=keep` it stays at the site between rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.config.schema import TrainingSettings
from fedtune.model.layout import AdapterLayout

Named = Sequence[tuple[str, nn.Parameter]]


def make_optimizer(settings: TrainingSettings, parameters: Named, layout: AdapterLayout) -> torch.optim.Optimizer:
    """Make the site's optimiser with one group for LoRA and one for the head."""
    roles = {spec.name: spec.role for spec in layout.tensors}
    head = [parameter for name, parameter in parameters if roles[name] == "head"]
    factors = [parameter for name, parameter in parameters if roles[name] != "head"]
    rates = (settings.learning_rate, settings.head_learning_rate or settings.learning_rate)
    groups = [
        {"params": members, "lr": rate, "initial_lr": rate}
        for members, rate in zip((factors, head), rates, strict=True)
        if members
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)


def schedule_factor(schedule: str, step: int, total: int) -> float:
    """Return the factor on the learning rate at step `step` of `total` (0-based): 1 at first, falling towards 0."""
    progress = step / total
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def noise_factor(limit: float | None, noise_std: float) -> float:
    """Return the factor on the learning rate for noise of `noise_std` in the mean gradient: 1 up to `limit`."""
    return 1.0 if limit is None or noise_std <= limit else limit / noise_std


def step(optimizer: torch.optim.Optimizer, parameters: Named, gradient: Tensor, factor: float) -> None:
    """Apply one flat gradient (numbers,), in the order of `parameters`, at `factor` times the learning rate."""
    offset = 0
    for _, parameter in parameters:
        piece = gradient[offset : offset + parameter.numel()]
        parameter.grad = piece.view_as(parameter).to(device=parameter.device, dtype=parameter.dtype)
        offset += parameter.numel()
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def dump_state(optimizer: torch.optim.Optimizer, parameters: Named) -> dict[str, NDArray[np.float32]]:
    """Return the optimiser's moments as arrays named `<parameter>/<moment>`."""
    return {
        f"{name}/{key}": value.detach().cpu().float().numpy().copy()
        for name, parameter in parameters
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_state(optimizer: torch.optim.Optimizer, parameters: Named, state: Mapping[str, NDArray[np.float32]]) -> None:
    """Restore moments dumped by `dump_state`."""
    by_name = dict(parameters)
    for key, value in state.items():
        name, moment = key.rsplit("/", 1)
        parameter = by_name[name]
        tensor = torch.tensor(value)
        optimizer.state[parameter][moment] = tensor if moment == "step" else tensor.to(parameter.device)
