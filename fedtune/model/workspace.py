"""One adapted model in memory, used by every site and the coordinator of one process: adapters are swapped in and out.

A workspace knows the adapter's layout, loads and exports adapter states, and turns a batch into logits. It knows
neither losses, privacy nor rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.data.batches import Batch
from fedtune.data.tasks import Task
from fedtune.errors import ModelError
from fedtune.model.adapters import canonical_name
from fedtune.model.layout import AdapterLayout, AdapterState


@dataclass(frozen=True, slots=True)
class Workspace:
    """An adapted model, its tokenizer and its trainable parameters by canonical name.

    `peft` is the PEFT model inside (`model` itself, or its backbone under a pooled head). The base is frozen and in
    evaluation mode; only LoRA's own dropout is ever active.
    """

    model: nn.Module
    peft: Any
    tokenizer: Any
    task: Task
    layout: AdapterLayout
    parameters: dict[str, nn.Parameter]
    initial: AdapterState
    device: torch.device

    def load(self, state: AdapterState) -> None:
        """Copy an adapter state into the model; tensors that the state does not name stay as they are."""
        with torch.no_grad():
            for name, value in state.items():
                parameter = self.parameters[name]
                if parameter.shape != value.shape:
                    raise ModelError(
                        "wrong-shape", f"{name} has shape {value.shape}, the model has {tuple(parameter.shape)}"
                    )
                parameter.copy_(torch.tensor(value))

    def export(self, layout: AdapterLayout) -> AdapterState:
        """Copy the tensors of a layout out of the model."""
        return {name: self.parameters[name].detach().cpu().numpy().copy() for name in layout.names}

    def train_only(self, layout: AdapterLayout) -> tuple[tuple[str, nn.Parameter], ...]:
        """Let gradients flow to the tensors of a layout alone, and return them in canonical order."""
        wanted = set(layout.names)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in wanted)
        return tuple((name, self.parameters[name]) for name in layout.names)

    def logits(self, batch: Batch) -> Tensor:
        """Return logits: (records, labels) for classification, (records, tokens, vocabulary) for language modelling."""
        if self.task.kind == "causal-lm" or self.model is self.peft:
            extra = {"use_cache": False} if self.task.kind == "causal-lm" else {}
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra)
            result: Tensor = output.logits
            return result
        pooled: Tensor = self.model(batch.input_ids, batch.attention_mask)
        return pooled

    @property
    def pad_id(self) -> int:
        """The token that fills a batch; masked out, so any id does when the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else 0

    @contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Activate LoRA's dropout inside the block, from its own seed; the global generator is left as it was."""
        layers = [module for name, module in self.model.named_modules() if "lora_dropout" in name]
        if not any(isinstance(module, nn.Dropout) for module in layers):
            yield
            return
        with torch.random.fork_rng(devices=_cuda_devices(self.device)):
            torch.manual_seed(seed)
            _set_training(layers, active=True)
            try:
                yield
            finally:
                _set_training(layers, active=False)


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return trainable parameters by canonical name."""
    found = {canonical_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ModelError("nothing-trainable", "the adapted model has no trainable parameter", hint="lora.targets=auto")
    return found


def _set_training(modules: Sequence[nn.Module], *, active: bool) -> None:
    for module in modules:
        module.train(active)


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
