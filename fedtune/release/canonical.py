"""The one form in which a LoRA adapter is released, so that no consumer has anything to misread.

Plain LoRA: one rank, a whole `lora_alpha`, target modules by name, and nothing else that changes what is computed: no
rslora, DoRA, patterns or biases, and `modules_to_save` for a sequence classifier's head alone, which PEFT itself treats
as a part of such an adapter. A study's scale s = alpha / rank is kept at every rank R that an
aggregation may end with: W = W0 + s·B·A, saved with r = R and `lora_alpha` = s·R where that is a whole number, else
with s folded into B and `lora_alpha` = R.

Knows no file and no tensor's value.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedtune.config.schema import LoraSettings
from fedtune.errors import ReleaseError

CLASSIFIER = "SEQ_CLS"
PREFIX = "base_model.model."  # before a module's name in a saved PEFT adapter
TASK_TYPES = {"none": "CAUSAL_LM", "pooled": "FEATURE_EXTRACTION", "architecture": CLASSIFIER}
_FREE = {
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
}
_INSTEAD = {
    "modules_to_save": "train without whole modules; only a classifier's own head may be one (task_type SEQ_CLS)",
    "use_dora": "train plain LoRA; a DoRA adapter can be merged into its base by peft",
    "use_rslora": "write alpha·√r as lora_alpha, and use_rslora false",
    "rank_pattern": "pad every layer with zeros to one rank",
    "alpha_pattern": "fold each layer's scale into its B",
    "bias": "train with bias none",
}
_OTHERWISE = "release what fedtune trains: plain LoRA"


@dataclass(frozen=True, slots=True)
class Form:
    """r and `lora_alpha` as saved; B is saved times `fold`."""

    rank: int
    alpha: int
    fold: float


def form_of(lora: LoraSettings, rank: int) -> Form:
    """Return how an adapter of some rank is saved in a study's scale alpha / rank."""
    alpha = lora.alpha * rank / lora.rank
    whole = round(alpha)
    if whole >= 1 and math.isclose(alpha, whole, rel_tol=1e-12):
        return Form(rank, whole, 1.0)
    return Form(rank, rank, lora.alpha / lora.rank)


def scale_back(config: Mapping[str, Any], lora: LoraSettings) -> float:
    """Return what a saved B is to be multiplied with to stand in the study's scale; 1 unless it was folded."""
    factor = (config["lora_alpha"] / config["r"]) / (lora.alpha / lora.rank)
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor


def explicit_targets(layers: Collection[str], modules: Collection[str]) -> list[str]:
    """Return names by which plain PEFT adapts exactly these layers of a model with these modules.

    The last parts of the names where they mean no other module, else the whole names: with `lora.layers`, with modules
    that were left out, and where a head has a module of the same name.
    """
    short = sorted({layer.rsplit(".", 1)[-1] for layer in layers})
    meant = {module for module in modules if module.rsplit(".", 1)[-1] in short}
    return short if meant == set(layers) else sorted(layers)


def configuration(name: str, head: str, form: Form, targets: Collection[str], **more: Any) -> dict[str, Any]:
    """Return `adapter_config.json`; `name` is the base model's, `more` are `lora_dropout` and `fan_in_fan_out`."""
    made: dict[str, Any] = {
        **_plain(),
        "task_type": TASK_TYPES[head],
        "base_model_name_or_path": name,
        "inference_mode": True,
        "r": form.rank,
        "lora_alpha": form.alpha,
        "target_modules": sorted(targets),
        **more,
    }
    require_canonical(made)
    return made


def require_canonical(config: Mapping[str, Any]) -> None:
    """Refuse an adapter configuration that is anything but plain LoRA: `release.not-canonical`, naming the field.

    Every field that plain LoRA does not need must have PEFT's default, those that PEFT will add one day included.
    """
    plain = _plain()
    if config.get("peft_type") != "LORA":
        raise _refused("peft_type", config.get("peft_type"))
    free = _FREE | ({"modules_to_save"} if config.get("task_type") == CLASSIFIER else set())
    for name, value in config.items():
        if name not in free and value != plain.get(name) and (value or plain.get(name)):
            raise _refused(name, value)
    for name in ("r", "lora_alpha"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise _refused(name, config.get(name), "fold the scale into B: a consumer may cut the fraction off")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise _refused("target_modules", targets, "name the modules in a list")


def _refused(name: str, value: object, hint: str = "") -> ReleaseError:
    message = f"an adapter with {name}={value!r:.80} is not plain LoRA, and consumers misread it"
    return ReleaseError("not-canonical", message, hint=hint or _INSTEAD.get(name, _OTHERWISE))


@lru_cache(maxsize=1)
def _plain() -> dict[str, Any]:
    """Return PEFT's own words for plain LoRA."""
    from peft import LoraConfig

    config: dict[str, Any] = LoraConfig().to_dict()
    return {**config, "peft_type": "LORA", "task_type": None, "target_modules": None}
