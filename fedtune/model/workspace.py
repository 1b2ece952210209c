"""One adapted model in memory, used by every site and the coordinator of one process: adapters are swapped in and out.

A workspace knows the adapter's layout, loads and exports adapter states, and turns a batch into logits. It knows
neither losses, privacy nor rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.data.batches import Batch, padding_id
from fedtune.data.tasks import Task
from fedtune.errors import ModelError
from fedtune.model.adapters import canonical_name
from fedtune.model.checkpointing import checkpointed
from fedtune.model.dropout import SourcedDropout
from fedtune.model.increments import Increments
from fedtune.model.layout import INCREMENT, AdapterLayout, AdapterState
from fedtune.privacy.random import RandomSource


@dataclass(frozen=True, slots=True)
class Workspace:
    """An adapted model, its tokenizer and its trainable parameters by canonical name.

    `peft` is the PEFT model inside (`model` itself, or its backbone under a pooled head). The base is frozen and in
    evaluation mode, and `base` is what the loaded state adds to its weights; only LoRA's own dropout is ever active.
    `autocast` is the type of its matrix products, None for that of the tensors; `recomputed` are the layers whose
    activations are computed again in the backward pass.
    """

    model: nn.Module
    peft: Any
    tokenizer: Any
    task: Task
    layout: AdapterLayout
    parameters: dict[str, nn.Parameter]
    initial: AdapterState
    base: Increments
    device: torch.device
    autocast: torch.dtype | None = None
    recomputed: tuple[nn.Module, ...] = ()

    def load(self, state: AdapterState) -> None:
        """Copy an adapter state into the model; tensors that the state does not name stay as they are.

        Increments of the base are no such tensors: after each call the base holds those of this state and no others.
        """
        with torch.no_grad():
            self.base.load(state)
            for name, value in state.items():
                if name.startswith(INCREMENT):
                    continue
                parameter = self.parameters.get(name)
                if parameter is None:
                    raise ModelError("unknown-tensor", f"the adapted model has no tensor {name!r:.80}")
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
        """Return logits: (records, labels) for classification, (records, tokens, vocabulary) for language modelling.

        In the plan's precision, here and not in the loops around it, so that training and evaluation agree. A backward
        pass may follow at any time and needs no block.
        """
        with self.precision(), checkpointed(self.recomputed):
            return self._logits(batch)

    def _logits(self, batch: Batch) -> Tensor:
        if self.task.kind == "causal-lm" or self.model is self.peft:
            result: Tensor = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            return result
        pooled: Tensor = self.model(batch.input_ids, batch.attention_mask)
        return pooled

    def precision(self) -> torch.autocast:
        """Return a block in which the model computes in the plan's precision."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @property
    def pad_id(self) -> int:
        """The token that fills a batch, which is also the one that an architecture's own head skips."""
        return padding_id(self.tokenizer)

    @contextmanager
    def dropout(self, source: RandomSource) -> Iterator[None]:
        """Activate LoRA's dropout inside the block, with masks from `source`; no other generator is touched."""
        layers = [module for module in self.model.modules() if isinstance(module, SourcedDropout)]
        for layer in layers:
            layer.source = source
        try:
            yield
        finally:
            for layer in layers:
                layer.source = None


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return trainable parameters by canonical name."""
    found = {canonical_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ModelError("nothing-trainable", "the adapted model has no trainable parameter", hint="lora.targets=auto")
    return found
