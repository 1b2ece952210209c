"""Gradient checkpointing: a layer's activations are thrown away and computed again in the backward pass.

transformers' own switch acts on layers in training mode only, which would wake the base's dropout; here the base stays
in evaluation mode. Recomputation sees the same LoRA dropout masks, so the gradients are bit for bit those of a pass
without checkpointing. Knows no loss, no adapter and no privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedtune.errors import ModelError
from fedtune.model.dropout import MaskMemory, SourcedDropout


def checkpointable(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the layers that transformers means to be recomputed as one, outermost only.

    Error: `model.no-checkpointing` for an architecture that names none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(layer, GradientCheckpointingLayer) and not inside:
            found[name] = layer
    if not found:
        architecture = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ModelError(
            "no-checkpointing",
            f"the architecture {architecture} has no layers that can be computed again",
            hint="training.gradient_checkpointing=false, and a smaller training.physical_batch for memory",
        )
    return tuple(found.values())


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Run the forwards of the layers as checkpoints inside the block; the backward pass may come after it.

    Memory falls from all activations to the layers' inputs, for one more forward pass of each layer. Nothing changes
    where no gradient is asked for.
    """
    chosen = layers if torch.is_grad_enabled() else ()
    for layer in chosen:
        vars(layer)["forward"] = _recomputed(layer)
    try:
        yield
    finally:
        for layer in chosen:
            del vars(layer)["forward"]


def _recomputed(layer: nn.Module) -> Callable[..., Any]:
    forward = layer.forward
    dropouts = [module for module in layer.modules() if isinstance(module, SourcedDropout)]

    def blocks() -> tuple[Any, Any]:
        memory = MaskMemory(dropouts)
        return memory.keeping(), memory.repeating()

    # Nothing in a frozen base in evaluation mode draws from torch's generators, so their state need not be kept.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=blocks)
