"""LoRA on a base model through PEFT: which layers, under which canonical names, and from which start.

Canonical names are those of a saved PEFT adapter (`….lora_A.weight`), so that what is aggregated, saved and loaded
elsewhere has one name. Uses PEFT's public functions and its table of default targets.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from fedtune.config.schema import LoraSettings
from fedtune.errors import ModelError
from fedtune.model.cores import add_cores
from fedtune.model.dropout import replace_dropout
from fedtune.model.layout import AdapterLayout, AdapterState, Array, Role, TensorSpec
from fedtune.privacy.random import SeededSource

_ADAPTER = "default"
_TASK_TYPES = {"none": "CAUSAL_LM", "architecture": "SEQ_CLS", "pooled": "FEATURE_EXTRACTION"}


def adapt(model: nn.Module, lora: LoraSettings, head: str, fresh: Sequence[str], *, cores: bool = False) -> nn.Module:
    """Wrap a model with LoRA; `fresh` are modules the checkpoint did not hold, which are trained and saved in full.

    With `cores` every layer has the trained core of `fedsb` between its factors.
    """
    from peft import LoraConfig, get_peft_model

    _check_layers(model, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora),
        task_type=_TASK_TYPES[head],
        exclude_modules=_shared(model, lora) or None,
        modules_to_save=list(fresh) or None,
        layers_to_transform=None if lora.layers is None else list(lora.layers),
        bias="none",
        fan_in_fan_out=_uses_conv1d(model),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise _no_target(model, lora) from error
    _check_every_target(adapted, lora)
    _refuse_tied(adapted)
    replace_dropout(adapted)
    if cores:
        add_cores(adapted)
    return adapted


def canonical_name(parameter: str) -> str:
    """Return the name under which PEFT saves a parameter."""
    name = parameter.removeprefix("backbone.").replace(f".lora_B.{_ADAPTER}.core.weight", ".lora_R.weight")
    return name.replace(f".modules_to_save.{_ADAPTER}.", ".").replace(f".{_ADAPTER}.weight", ".weight")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers by the name that the layout has for them."""
    return {
        canonical_name(f"{name}.lora_A.{_ADAPTER}.weight").removesuffix(".lora_A.weight"): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def layout_of(parameters: Iterable[tuple[str, tuple[int, ...]]]) -> AdapterLayout:
    """Return the layout of named trainable parameters."""
    return AdapterLayout(tuple(sorted((_spec(name, shape) for name, shape in parameters), key=lambda spec: spec.name)))


def initial_factors(layout: AdapterLayout, start: str, seed: int) -> AdapterState:
    """Return the LoRA start of a study: B (and a core) zero, A by `lora.init` from the plan's seed.

    `uniform` is ±1/√d_in in each place, PEFT's own distribution. `orthonormal` has orthonormal rows, what `fedsvd`
    keeps A at; (with rank above d_in the rows are orthonormal columns instead). Drawn with NumPy from the seed and the
    tensor's name, so that a frozen A that is never sent is the same on every machine and under every version of torch.
    """
    return {spec.name: _initial(spec, start, seed) for spec in layout.tensors if spec.role != "head"}


def _initial(spec: TensorSpec, start: str, seed: int) -> Array:
    if spec.role in {"lora_B", "lora_R"}:
        return np.zeros(spec.shape, dtype=np.float32)
    source = SeededSource("lora_A", seed, spec.name)
    if start == "orthonormal":
        tall = source.normal(spec.size).reshape(max(spec.shape), min(spec.shape))
        basis, upper = np.linalg.qr(tall)
        basis = (basis * np.sign(np.diag(upper))).astype(
            np.float32
        )  # the one QR with a positive diagonal: no free sign
        return np.ascontiguousarray(basis if basis.shape == spec.shape else basis.T)
    drawn: Array = ((2.0 * source.uniform(spec.size) - 1.0) / np.sqrt(spec.shape[1])).astype(np.float32)
    return drawn.reshape(spec.shape)


def _spec(name: str, shape: tuple[int, ...]) -> TensorSpec:
    for role in ("lora_A", "lora_B"):
        if name.endswith(f".{role}.weight"):
            kept: Role = "lora_A" if role == "lora_A" else "lora_B"
            return TensorSpec(name, shape, kept, name.removesuffix(f".{role}.weight"))
    return TensorSpec(name, shape, "lora_R" if name.endswith(".lora_R.weight") else "head")


def _targets(model: nn.Module, lora: LoraSettings) -> str | list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if lora.targets == "all-linear":
        # PEFT restricts names to layers, not the word; a head is in no layer, so its name does no harm.
        return "all-linear" if lora.layers is None else _linear_names(model)
    if lora.targets == "auto":
        known = DEFAULTS.get(getattr(model.config, "model_type", ""))
        return list(known) if known else "all-linear"
    return list(lora.targets)


def _shared(model: nn.Module, lora: LoraSettings) -> list[str]:
    """Return layers that DeBERTa applies to its relative positions, once for all records: unless named, none adapts.

    Their gradient belongs to no single record, so a private round refuses it.
    """
    if not isinstance(lora.targets, str) or not getattr(model.config, "relative_attention", False):
        return []
    reused = ("query_proj", "key_proj") if getattr(model.config, "share_att_key", False) else ()
    return ["pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj", *reused]


def _uses_conv1d(model: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _check_every_target(adapted: nn.Module, lora: LoraSettings) -> None:
    if isinstance(lora.targets, str):
        return
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    for target in lora.targets:
        found = [module for name, module in layers.items() if name.endswith(f".{target}")]
        if not found or not all(_adaptable(module.get_base_layer()) for module in found):
            raise _no_target(adapted, lora)


def _refuse_tied(adapted: nn.Module) -> None:
    """Refuse an adapter on a weight that another module uses too (an output layer tied to the embedding).

    It would train right, but merged into the base, as PEFT does on request, it would change both: another model.
    """
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in adapted.named_modules():
        if (weight := vars(module)["_parameters"].get("weight")) is not None:
            users[id(weight)].append(name)
    for name, module in adapted.named_modules():
        shared = users[id(getattr(module.get_base_layer(), "weight", None))] if hasattr(module, "lora_A") else []
        elsewhere = [user for user in shared if not user.startswith(f"{name}.")]
        if elsewhere:
            raise ModelError(
                "tied-target",
                f"lora.targets names {_last(name)}, whose weight is that of {_last(elsewhere[0])} too; merged into the "
                "base, the adapter would change both",
                hint=f"leave {_last(name)} out of lora.targets",
            )


def _no_target(model: nn.Module, lora: LoraSettings) -> ModelError:
    names = _linear_names(model)
    wanted = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    return ModelError(
        "no-target",
        f"lora.targets={wanted} names not only linear layers of the model, which are {', '.join(names)}",
        hint="lora.targets=auto or lora.targets=[NAME,…]",
    )


def _check_layers(model: nn.Module, lora: LoraSettings) -> None:
    count = int(getattr(model.config, "num_hidden_layers", 0))
    missing = [index for index in lora.layers or () if index >= count > 0]
    if missing:
        raise ModelError(
            "no-layer",
            f"lora.layers names layer {missing[0]}; the model has layers 0 to {count - 1}",
            hint="lora.layers=null adapts all of them",
        )


def _linear_names(model: nn.Module) -> list[str]:
    found = [name for name, module in model.named_modules() if _adaptable(module) and "lora_" not in name]
    return sorted({_last(name) for name in found})


def _adaptable(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _last(name: str) -> str:
    return re.sub(r"\.base_layer$", "", name).rsplit(".", 1)[-1]
