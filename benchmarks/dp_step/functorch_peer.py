"""Per-record gradients by `torch.func`: `vmap` of `grad` over the trainable tensors, as in PyTorch's own tutorial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.dp_step.models import Subject, logits
from benchmarks.dp_step.peers import Terms, batch_loss, sgd
from fedtune.data.batches import Batch
from fedtune.privacy.losses import Task


class Functorch:
    """All gradients of a batch at once, then clipping and noise.

    transformers looks at the values of a mask (records, tokens), which `vmap` forbids; a mask of four dimensions it
    takes as it is, so this peer makes one first.
    """

    def __init__(self, subject: Subject, terms: Terms) -> None:
        self._subject, self._terms = subject, terms
        self._parameters = dict(subject.parameters)
        self._optimizer = sgd(subject, terms)
        inner = next(layer for layer in subject.model.modules() if isinstance(layer, PreTrainedModel))
        inner.register_forward_pre_hook(_with_full_mask(subject.kind, inner.dtype), with_kwargs=True)
        self._gradients = torch.func.vmap(torch.func.grad(self._loss), in_dims=(None, 0, 0, 0))

    def step(self, batches: Sequence[Batch], expected: float) -> None:
        """Form all gradients of each batch, clip, sum, add noise, divide, step."""
        sums = {name: torch.zeros_like(tensor) for name, tensor in self._parameters.items()}
        held = {name: tensor.detach() for name, tensor in self._parameters.items()}
        for batch in batches:
            rows = self._gradients(held, batch.input_ids, batch.attention_mask, batch.labels)
            self._add_clipped(sums, rows)
        deviation = self._terms.noise_multiplier * self._terms.clip_norm
        for name, tensor in self._parameters.items():
            tensor.grad = sums[name].add_(torch.randn_like(sums[name]), alpha=deviation).div_(expected)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _loss(self, held: dict[str, Tensor], ids: Tensor, mask: Tensor, label: Tensor) -> Tensor:
        def call(**inputs: object) -> object:
            return torch.func.functional_call(self._subject.model, held, kwargs=inputs)

        record = Batch(ids[None], mask[None], label[None])
        return batch_loss(self._subject.kind, logits(call, self._subject.kind, record), record.labels)

    def _add_clipped(self, sums: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        norms = torch.stack([row.flatten(1).norm(dim=1) for row in rows.values()]).norm(dim=0)
        scales = (self._terms.clip_norm / (norms + 1e-6)).clamp(max=1.0)
        for name, row in rows.items():
            sums[name] += torch.einsum("b,b...->...", scales.to(row.dtype), row)


def _with_full_mask(kind: Task, dtype: torch.dtype) -> Any:
    """Return a hook that makes an additive mask (records, 1, tokens, tokens) of `attention_mask` (records, tokens)."""

    def before(
        _layer: object, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = named["attention_mask"].bool()
        seen = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
        if kind == "causal-lm":
            seen = seen.tril()
        hidden = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        return inputs, named | {"attention_mask": hidden}

    return before
