"""Families of models that llama.cpp computes exactly as `transformers` does, and what their weights need for it.

Knows names, not numbers: what the configuration must say is `hyperparameters`, how weights are laid out is `layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.errors import ReleaseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gguf import TensorNameMap


@dataclass(frozen=True, slots=True)
class Family:
    """A `model_type` of `transformers` and how llama.cpp wants it.

    `architecture` is the name in GGUF; `prefix` stands before every module but the output head; `class_name` is the
    language model's class. `permutes`: the rotary pairs of q and k lie next to each other instead of in halves.
    `shifts_norm`: the norm's weight w means 1 + w. `transposes`: linear layers are stored (in, out).
    `drops_output`: llama.cpp always multiplies by the embedding, never by a head of its own.
    """

    model_type: str
    architecture: str
    class_name: str
    prefix: str = "model."
    permutes: bool = False
    shifts_norm: bool = False
    transposes: bool = False
    drops_output: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "llama", "LlamaForCausalLM", permutes=True),
        Family("mistral", "llama", "MistralForCausalLM", permutes=True),
        Family("qwen2", "qwen2", "Qwen2ForCausalLM"),
        Family("gemma", "gemma", "GemmaForCausalLM", shifts_norm=True, drops_output=True),
        Family("gemma2", "gemma2", "Gemma2ForCausalLM", shifts_norm=True, drops_output=True),
        Family("gpt2", "gpt2", "GPT2LMHeadModel", prefix="transformer.", transposes=True),
    )
}
OUTPUT_MODULE = "lm_head"


def check_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a model by its `config.json`.

    Errors: `release.no-gguf-family` for another family, or another task than generating text;
    `release.quantised-base` when the weights are no plain floating-point numbers.
    """
    name = str(config.get("model_type", "unknown"))
    family = FAMILIES.get(name)
    if family is None:
        raise ReleaseError(
            "no-gguf-family",
            f"the base is a {name} model; GGUF is written for {', '.join(FAMILIES)}",
            hint="fedtune release RUN --to peft, or --to merged for transformers",
        )
    classes = config.get("architectures") or [family.class_name]
    if classes[0] != family.class_name:
        raise ReleaseError(
            "no-gguf-family",
            f"the base is a {classes[0]}; llama.cpp needs {family.class_name}, a model that generates text",
            hint="fedtune release RUN --to peft, or --to merged for transformers",
        )
    if config.get("quantization_config"):
        raise ReleaseError(
            "quantised-base",
            "the base's weights are quantised; GGUF is written from floating-point weights",
            hint="merge into the unquantised base: fedtune release RUN --to merged",
        )
    return family


@dataclass(frozen=True, slots=True)
class Names:
    """From a module's name in `transformers` to its name in GGUF, by the table of the package `gguf`."""

    family: Family
    table: TensorNameMap

    def of(self, module: str) -> str | None:
        """Return the GGUF name of a module; a checkpoint of the bare backbone has no prefix and is found too."""
        if module == OUTPUT_MODULE:
            return self.table.get_name(module)
        full = module if module.startswith(self.family.prefix) else self.family.prefix + module
        return self.table.get_name(full)


def names_of(family: Family, layers: int) -> Names:
    """Return the name table of a family for a number of layers."""
    import gguf

    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return Names(family, gguf.get_tensor_name_map(architecture, layers))
