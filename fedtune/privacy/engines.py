"""Per-record gradients of the trainable parameters, one backward pass for a whole physical batch.

`PerSampleEngine` is the interface; `OpacusEngine` keeps it with Opacus' hooks on a model that stays unwrapped. Knows
nothing of clipping, noise or sampling, and trusts no layer: a gradient that is not one row a record is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from fedtune.errors import PrivacyError
from fedtune.privacy.inspection import refuse_coupled

if TYPE_CHECKING:
    from types import TracebackType

Parameters = Sequence[tuple[str, nn.Parameter]]
BatchLosses = Callable[[], Tensor]


class PerSampleEngine(Protocol):
    """Turns per-record losses into per-record gradients."""

    def per_sample_gradients(self, batch_losses: BatchLosses, records: int) -> Tensor:
        """Return (records, P): row i is the gradient of record i's loss, parameters flat in the engine's order."""

    def close(self) -> None:
        """Leave the model as it was found."""


def summed_gradient(parameters: Parameters, batch_losses: BatchLosses, records: int) -> Tensor:
    """Return Σ_i ∇loss_i (P,) in float32 (float64 for a float64 model).

    For `privacy.mode=off` only: nothing bounds one record in it.
    """
    tensors = [tensor for _, tensor in parameters]
    gradients: tuple[Tensor | None, ...] = (None,) * len(tensors)
    if records:
        with torch.enable_grad():
            losses = _checked(batch_losses(), records)
            gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
    pairs = zip(gradients, tensors, strict=True)
    flat = [(torch.zeros_like(tensor) if one is None else one).reshape(-1) for one, tensor in pairs]
    return torch.cat(flat).to(torch.promote_types(_precision(parameters), torch.float32))


def _precision(parameters: Parameters) -> torch.dtype:
    """Return the type that holds every parameter's gradient."""
    return reduce(torch.promote_types, (tensor.dtype for _, tensor in parameters))


def _checked(losses: Tensor, records: int) -> Tensor:
    if losses.shape != (records,):
        raise PrivacyError(
            "coupled-records",
            f"{records} records need as many losses, found shape {tuple(losses.shape)}; a loss over the batch couples "
            "its records.",
            hint="Compute one loss a record, see fedtune.privacy.losses.record_losses.",
        )
    return losses


class OpacusEngine:
    """Per-record gradients by Opacus' hooks; the model is neither wrapped nor copied, `close` removes the hooks.

    `parameters` are all trainable parameters of `model`, in the order of the flat rows. Raises PrivacyError where
    records are mixed (see `inspection`), where a trainable parameter lies in a layer that Opacus has no rule for, is
    not listed, or the model carries another engine's hooks.
    """

    def __init__(self, model: nn.Module, parameters: Parameters) -> None:
        refuse_coupled(model)
        self._owners = _owners(model, parameters)
        self._parameters = tuple(parameters)
        if hasattr(model, "autograd_grad_sample_hooks"):
            raise PrivacyError("engine-open", "the model already carries the hooks of another per-sample engine.")
        self._hooks = GradSampleHooks(model, loss_reduction="sum", strict=True)
        self._hooks.disable_hooks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        rows = torch.zeros(records, sum(sizes), dtype=_precision(self._parameters), device=device)
        if not records:
            return rows
        try:
            with self._recording(), torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                losses = _checked(batch_losses(), records)
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

    def _reset(self) -> None:
        """Forget this pass, also one that an error interrupted, so that it cannot leak into the next."""
        for layer in self._owners.values():
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)
        for _, tensor in self._parameters:
            tensor.grad = None
            tensor.__dict__.update(grad_sample=None, _forward_counter=0)  # where Opacus keeps its state
            tensor.__dict__.pop("_current_grad_sample", None)


def _owners(model: nn.Module, parameters: Parameters) -> dict[str, nn.Module]:
    """Every layer that holds a trainable parameter, by name; refuses what Opacus has no rule for."""
    listed = {id(tensor) for _, tensor in parameters}
    owners = {}
    for name, layer in model.named_modules():
        trainable = [(key, tensor) for key, tensor in layer.named_parameters(recurse=False) if tensor.requires_grad]
        for key, tensor in trainable:
            if id(tensor) not in listed:
                raise PrivacyError("unlisted", f"{name}.{key} is trainable but not among the private parameters.")
        if not trainable:
            continue
        if type(layer) not in GradSampleHooks.GRAD_SAMPLERS:
            raise PrivacyError(
                "unsupported-layer",
                f"no per-record gradient rule exists for the layer {name} ({type(layer).__name__}).",
                hint="Freeze it, or choose other lora.targets.",
            )
        owners[name] = layer
    trained = {id(tensor) for layer in owners.values() for tensor in layer.parameters(recurse=False)}
    missing = [name for name, tensor in parameters if id(tensor) not in trained or not tensor.requires_grad]
    if missing or not owners:
        raise PrivacyError("frozen", f"nothing in this model trains {', '.join(missing) or 'at all'}.")
    return owners
