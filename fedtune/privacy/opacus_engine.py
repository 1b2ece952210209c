"""Per-record gradients by Opacus' hooks on a model that stays unwrapped: the reference for the engine of our own.

Knows nothing of clipping, noise or sampling, and trusts no layer: a gradient that is not one row a record is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from fedtune.errors import PrivacyError
from fedtune.privacy.engines import BatchLosses, Parameters, PerSampleEngine, checked_losses, precision
from fedtune.privacy.inspection import refuse_coupled
from fedtune.privacy.owners import owners, refuse_second


class OpacusEngine(PerSampleEngine):
    """Per-record gradients by Opacus' hooks; the model is neither wrapped nor copied, `close` removes the hooks.

    `parameters` are all trainable parameters of `model`, in the order of the flat rows. Raises PrivacyError where
    records are mixed (see `inspection`), where a trainable parameter lies in a layer that Opacus has no rule for, is
    not listed, or the model carries another engine's hooks.
    """

    def __init__(self, model: nn.Module, parameters: Parameters) -> None:
        refuse_coupled(model)
        self._owners = owners(model, parameters)
        _refuse_without_rule(self._owners)
        self._parameters = tuple(parameters)
        refuse_second(model)
        self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=True)
        self._hooks.disable_hooks()

    def close(self) -> None:
        """Remove every hook and attribute from the model."""
        self._hooks.cleanup()

    def per_sample_gradients(self, batch_losses: BatchLosses, records: int) -> Tensor:
        """Return (records, P) gradients; `batch_losses` runs the forward pass and returns (records,) losses.

        No records: (0, P), and the forward pass does not run. A parameter that took no part has zero rows. `.grad` of
        the parameters is None afterwards, also after an error. Raises PrivacyError where the losses or a layer's
        inputs are not one for each record; the layer is named.
        """
        sizes = [tensor.numel() for _, tensor in self._parameters]
        device = self._parameters[0][1].device
        rows = torch.zeros(records, sum(sizes), dtype=precision(self._parameters), device=device)
        if not records:
            return rows
        try:
            with self._recording(), torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                losses = checked_losses(batch_losses(), records)
                self._check_inputs(records)
                losses.sum().backward()
            for (name, tensor), out in zip(self._parameters, rows.split(sizes, dim=1), strict=True):
                self._move(name, tensor, out)
            return rows
        finally:
            self._reset()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Let Opacus see the pass: it records in training mode only.

        The hooked layers behave alike in both modes, and no other layer is touched, so dropout stays as it was set.
        """
        modes = [(layer, layer.training) for layer in self._owners.values()]
        self._hooks.enable_hooks()
        try:
            for layer, _ in modes:
                layer.training = True
            yield
        finally:
            self._hooks.disable_hooks()
            for layer, mode in modes:
                layer.training = mode

    def _check_inputs(self, records: int) -> None:
        """Every use of a layer must see one row a record.

        More rows are tokens, each of which would be clipped as a record. One row for all (the shared position
        embeddings of DeBERTa) would be worse: Opacus books the gradient of all records on the first.
        """
        for name, layer in self._owners.items():
            for inputs in layer.__dict__.get("activations", ()):
                if len(inputs[0]) != records:
                    raise PrivacyError(
                        "flattened-records",
                        f"the layer {name} sees {len(inputs[0])} rows for {records} records: it flattens tokens into "
                        "the batch or is shared by the records, so there is no gradient for each record.",
                        hint="Choose other lora.targets, or a base model whose layers keep the batch dimension.",
                    )

    @staticmethod
    def _move(name: str, tensor: Any, out: Tensor) -> None:
        """Move one parameter's gradients into its columns of zeros, freeing them; leave the zeros if it has none."""
        found, tensor.grad_sample = tensor.grad_sample, None
        if found is None and tensor.grad is None:
            return
        if not isinstance(found, Tensor) or found.shape != (len(out), *tensor.shape):
            raise PrivacyError(
                "no-per-record-gradient",
                f"the layer of {name} has a gradient, but not one for each record.",
                hint="Turn gradient checkpointing off, and let the layer run as a module, not by its weight.",
            )
        out.copy_(found.reshape(out.shape))

    def arrange(self, total: Tensor) -> Tensor:
        """Return a sum of rows as it is: the columns already stand in the parameters' order."""
        return total

    def _reset(self) -> None:
        """Forget this pass, also one that an error interrupted, so that it cannot leak into the next."""
        for layer in self._owners.values():
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)
        for _, tensor in self._parameters:
            tensor.grad = None
            tensor.__dict__.update(grad_sample=None, _forward_counter=0)  # where Opacus keeps its state
            tensor.__dict__.pop("_current_grad_sample", None)


def _refuse_without_rule(held: Mapping[str, nn.Module]) -> None:
    for name, layer in held.items():
        if type(layer) not in GradSampleHooks.GRAD_SAMPLERS:
            raise PrivacyError(
                "unsupported-layer",
                f"Opacus has no per-record gradient rule for the layer {name} ({type(layer).__name__}).",
                hint="Freeze it, choose other lora.targets, or privacy.engine=lora.",
            )
