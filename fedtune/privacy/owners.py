"""Which layers hold the trained parameters, and whether a model is free for a per-record engine."""

from __future__ import annotations

from torch import nn

from fedtune.errors import PrivacyError
from fedtune.privacy.engines import Parameters


def owners(model: nn.Module, parameters: Parameters) -> dict[str, nn.Module]:
    """Return every layer that holds a trainable parameter, by name.

    Raises PrivacyError where a trainable parameter is not listed, or a listed one is frozen, of another model or
    listed twice.
    """
    listed = {id(tensor) for _, tensor in parameters}
    if len(listed) < len(parameters):
        raise PrivacyError("listed-twice", "a parameter is listed twice, so its gradient would count twice.")
    found = {}
    for name, layer in model.named_modules():
        trainable = [(key, tensor) for key, tensor in layer.named_parameters(recurse=False) if tensor.requires_grad]
        for key, tensor in trainable:
            if id(tensor) not in listed:
                raise PrivacyError("unlisted", f"{name}.{key} is trainable but not among the private parameters.")
        if trainable:
            found[name] = layer
    trained = {id(tensor) for layer in found.values() for tensor in layer.parameters(recurse=False)}
    missing = [name for name, tensor in parameters if id(tensor) not in trained or not tensor.requires_grad]
    if missing or not found:
        raise PrivacyError("frozen", f"nothing in this model trains {', '.join(missing) or 'at all'}.")
    return found


def refuse_second(model: nn.Module) -> None:
    """Refuse a model that already carries a per-record engine's hooks or forwards."""
    replaced = any("forward" in vars(layer) for layer in model.modules())
    if replaced or hasattr(model, "autograd_grad_sample_hooks"):
        raise PrivacyError("engine-open", "the model already carries the hooks of another per-sample engine.")
