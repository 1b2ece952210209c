"""Per-record gradients of our engine in the place of Opacus' hooks: `loss.backward()` fills `p.grad_sample`.

One pass goes from the forward call of the model to the optimiser's step. The records of a pass are counted where the
model is called, not where a layer is: a layer that folds tokens into the batch then differs from the count, and is
refused by name. Knows nothing of clipping, noise or sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleHooks
from torch import Tensor, nn

from fedtune.errors import PrivacyError
from fedtune.privacy.lora_engine import LoraEngine


class LoraGradSampleHooks(AbstractGradSampleHooks):  # type: ignore[misc]  # Opacus ships no types
    """Opacus' handle on a model whose layers record per-record gradients; `cleanup` leaves the model as it was.

    The model is neither wrapped nor copied. A call of it in training mode with gradients enabled starts a pass; every
    other call (evaluation mode, `no_grad`, `generate`) runs the layers fused and records nothing. After
    `loss.backward()` each parameter's `grad_sample` (records, *shape) is a view of the engine's rows, valid until the
    next call, zeros where it took no part.

    The loss is Σ_i loss_i with `loss_reduction="sum"` and its mean over the *records* with "mean"; `grad_sample` holds
    ∇loss_i in both cases, as in Opacus. A loss per record, written `losses.mean()`, is right. The mean over the
    *tokens* of a batch, which `model(labels=…)` of a language model returns, makes each record's gradient depend on the
    others' lengths: token labels in a call are refused, but a loss computed outside the model is out of sight here.
    `inspection.assert_independent` probes it.

    Raises PrivacyError where `LoraEngine` does; where a batch is not one row a record, in the call or in a layer; where
    the model is called twice without a step between; where a gradient went past the layers.
    """

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        if not batch_first:
            raise PrivacyError("batch-first", "records must be the first dimension of every input.")
        if loss_reduction not in {"mean", "sum"}:
            raise PrivacyError("loss-reduction", f'the loss reduction is {loss_reduction!r}, not "mean" or "sum".')
        named = [(name, tensor) for name, tensor in m.named_parameters() if tensor.requires_grad]
        self._engine = LoraEngine(m, named)  # before anything is attached: it may refuse the model
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._named: list[tuple[str, Any]] = list(named)
        self._pass = ExitStack()
        self._is_open = False
        self._declared: int | None = None
        self._handle = m.register_forward_pre_hook(self._before_call, with_kwargs=True)

    @property
    def tensors(self) -> list[Any]:
        """The trained parameters, in the order of `arrange`."""
        return [tensor for _, tensor in self._named]

    @property
    def grad_samples(self) -> list[Tensor]:
        """Each parameter's gradients (records, *shape); no records outside a pass."""
        return [self._engine.rows.of(tensor) for tensor in self.tensors]

    @contextmanager
    def batch(self, records: int) -> Iterator[None]:
        """Say how many records the calls inside the block hold, for a model whose arguments do not show it."""
        self._declared = records
        try:
            yield
        finally:
            self._declared = None

    def take(self) -> Tensor:
        """End the pass and return its rows (records, P), valid until the next call; no rows if there was no call.

        Raises PrivacyError where nothing was recorded, or a gradient is not one for each record.
        """
        rows = self._engine.rows
        if self._is_open and not rows.records:
            self._forget_gradients()  # sums over no records, possibly NaN
        self._refuse_unrecorded()
        if rows.records and not rows.written:
            raise PrivacyError(
                "no-backward",
                f"the model was called with {rows.records} records, but no backward pass has reached its layers.",
                hint="Call loss.backward() before optimizer.step(), or hooks.discard() to give the batch up.",
            )
        taken = rows.finished()
        self.discard()
        return taken

    def arrange(self, total: Tensor) -> Tensor:
        """Bring a sum of rows (P,) into the order of `tensors`."""
        return self._engine.arrange(total)

    def clear(self) -> None:
        """Forget recorded gradients, as `optimizer.zero_grad()` does: also between a call and its backward pass."""
        if self._engine.rows.written:
            self.discard()
            self._show()
        self._forget_gradients()

    def discard(self) -> None:
        """Give the open pass up, if there is one; its backward pass can no longer run."""
        self._pass.close()
        self._is_open = False

    def remove_hooks(self) -> None:
        """Give every layer its own forward back."""
        self.discard()
        self._handle.remove()
        self._engine.close()
        for tensor in self.tensors:
            vars(tensor).pop("summed_grad", None)  # Opacus' optimiser leaves it behind

    def _before_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        if self._is_open:
            raise PrivacyError(
                "second-call",
                "the model is called again before the optimiser has taken the last batch: gradients of two batches "
                "would be added up as if they were of the same records.",
                hint="Step after every batch (opacus' BatchMemoryManager makes one step of several), evaluate under "
                "torch.no_grad(), or give the last batch up with hooks.discard().",
            )
        if model.training:
            refuse_token_labels(kwargs)
            self._start(records_in(args, kwargs) if self._declared is None else self._declared)

    def _start(self, records: int) -> None:
        self._show()  # the last pass's views hold the memory that a larger batch replaces
        scale = float(records) if self.loss_reduction == "mean" else 1.0
        self._pass.enter_context(self._engine.rows.recording(records, scale))
        self._show([view.zero_() for view in self.grad_samples])
        self._is_open = True

    def _show(self, views: Sequence[Tensor | None] = ()) -> None:
        for tensor, view in zip_longest(self.tensors, views):
            tensor.grad_sample = view

    def _forget_gradients(self) -> None:
        for tensor in self.tensors:
            tensor.grad = None

    def _refuse_unrecorded(self) -> None:
        for name, tensor in self._named:
            if tensor.grad is not None:
                raise PrivacyError(
                    "no-per-record-gradient",
                    f"{name} has a gradient, but not one for each record: the model was not called in training mode "
                    "as a whole, or the parameter is used outside its layer.",
                    hint="Call the model that was given to make_private, after model.train() and "
                    "optimizer.zero_grad(), and let its layers run as modules.",
                )


def records_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the number of records in a call: the leading dimension that all tensors among its arguments share."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or "no tensor at all"
        raise PrivacyError(
            "uncounted-records",
            f"a call of the model does not show how many records it holds; its arguments are {shapes}.",
            hint="Call it inside `with hooks.batch(records):`, hooks being what make_private returned first.",
        )
    return sizes.pop()


def refuse_token_labels(kwargs: Mapping[str, Any]) -> None:
    """Refuse a call whose `labels` are tokens: the loss that comes back is a mean over the tokens of the batch."""
    labels = kwargs.get("labels")
    if isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
        raise PrivacyError(
            "coupled-records",
            "the model is asked for its own loss over token labels; it is a mean over the tokens of the whole batch, "
            "so each record's gradient depends on the others' lengths.",
            hint="Leave labels out of the call, and use fedtune.privacy.losses.record_losses on its logits.",
        )
