"""Builds a workspace: base model, LoRA, head and start, from the plan's words and a folder of this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fedtune.config.plan import ModelPlan
from fedtune.config.schema import LoraSettings
from fedtune.data.batches import collate, padding_id
from fedtune.data.records import LabelledText
from fedtune.data.tasks import Task
from fedtune.data.templates import render_all
from fedtune.errors import ModelError
from fedtune.model.adapters import adapt, initial_factors, layout_of, lora_layers
from fedtune.model.attention import use_float32_backward
from fedtune.model.base import BaseModel
from fedtune.model.checkpointing import checkpointable
from fedtune.model.heads import PooledClassifier, start_from_names
from fedtune.model.increments import base_layers
from fedtune.model.layout import AdapterState
from fedtune.model.precision import DTYPES, loading_options, refuse_unavailable
from fedtune.model.workspace import Workspace, named_trainable


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides an adapted model and how it is computed with, except the base's content.

    `cores` is for `fedsb`, whose layers have a third, small matrix.
    """

    task: Task
    lora: LoraSettings
    model: ModelPlan
    seed: int
    max_tokens: int
    autocast: str | None = None
    checkpointing: bool = False
    cores: bool = False


@lru_cache(maxsize=1)
def build(base: BaseModel, recipe: Recipe, device: str) -> Workspace:
    """Build, or return the one that this process has already built for the same base and recipe."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _refuse(base, recipe, device)
    tokenizer = load_tokenizer(base)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed % 2**32)  # only fresh modules of an architecture's own head are drawn from it
        model, peft = _assemble(base, recipe, tokenizer, device)
    _check_positions(base, model, recipe.max_tokens)
    return _finish(model, peft, tokenizer, recipe, torch.device(device))


def load_tokenizer(base: BaseModel) -> Any:
    """Load the tokenizer of a base model from its folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken folder makes transformers fail in many ways
        raise ModelError(
            "no-tokenizer",
            f"{base.folder} has no usable tokenizer: {_first_line(error)}",
            hint="fetch the whole model folder",
        ) from error


def check_length(base: BaseModel, max_tokens: int) -> None:
    """Refuse sequences longer than the model's positions."""
    limit = base.config.get("max_position_embeddings", base.config.get("n_positions"))
    if isinstance(limit, int) and 0 < limit < max_tokens:
        raise _too_long(base, max_tokens, limit)


def _check_positions(base: BaseModel, model: nn.Module, max_tokens: int) -> None:
    """Refuse sequences that reach the end of a position table whose first rows are not positions (RoBERTa, MPNet)."""
    for name, layer in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            limit = layer.num_embeddings - layer.padding_idx - 1
            if limit < max_tokens:
                raise _too_long(base, max_tokens, limit)


def _too_long(base: BaseModel, max_tokens: int, limit: int) -> ModelError:
    return ModelError(
        "sequence-limit",
        f"data.max_tokens={max_tokens} is above the {limit} positions of {base.name}",
        hint=f"data.max_tokens={limit}",
    )


def _refuse(base: BaseModel, recipe: Recipe, device: str) -> None:
    """Refuse what can be seen to be impossible before anything is loaded."""
    check_length(base, recipe.max_tokens)
    if base.config.get("is_encoder_decoder"):
        message = f"{base.name} is an encoder-decoder ({base.architecture}), which fedtune does not train"
        raise ModelError("encoder-decoder", message, hint="choose an encoder or a decoder as model.base")
    if recipe.model.head == "architecture" and recipe.model.head_init == "labels":
        raise ModelError("no-pooled-head", "model.head_init=labels needs the pooled head", hint="model.head=pooled")
    refuse_unavailable(base, recipe.model, recipe.autocast, device)


def _assemble(base: BaseModel, recipe: Recipe, tokenizer: Any, device: str) -> tuple[nn.Module, Any]:
    head = recipe.model.head
    if head == "pooled":
        backbone = _without_pooler(_load(base, recipe, tokenizer, "AutoModel", device)[0])
        width = int(backbone.config.hidden_size)
        peft = adapt(backbone, recipe.lora, head, (), cores=recipe.cores)
        return PooledClassifier(peft, width, len(recipe.task.labels), recipe.model.head_scale), peft
    kind = "AutoModelForCausalLM" if head == "none" else "AutoModelForSequenceClassification"
    model, fresh = _load(base, recipe, tokenizer, kind, device)
    peft = adapt(model, recipe.lora, head, fresh if head == "architecture" else (), cores=recipe.cores)
    return peft, peft


def _load(base: BaseModel, recipe: Recipe, tokenizer: Any, kind: str, device: str) -> tuple[Any, list[str]]:
    import transformers

    settings = {"local_files_only": True, "trust_remote_code": False, **loading_options(recipe.model, device)}
    if recipe.model.head == "architecture":
        # A decoder's head reads the last token that is not this one: it must be the token that batches are filled with,
        # or a record's logits would depend on how long the other records are.
        settings |= {"pad_token_id": padding_id(tokenizer)}
        settings |= {"num_labels": len(recipe.task.labels), "ignore_mismatched_sizes": True}
    try:
        loader = getattr(transformers, kind)
        model, info = loader.from_pretrained(base.folder, use_safetensors=True, output_loading_info=True, **settings)
    except Exception as error:  # a broken folder makes transformers fail in many ways
        raise _not_loaded(base, recipe, error) from error
    model.config.use_cache = False  # keys and values of earlier calls serve generation, which asks for them itself
    if recipe.model.attention == "auto":
        use_float32_backward(model)
    if recipe.model.head != "architecture" and (missing := _weights_missing(info, recipe.model.head)):
        raise ModelError(
            "missing-weights", f"{base.name} lacks {', '.join(missing[:3])}", hint="choose another model.base"
        )
    return model, _owners(info)


def _not_loaded(base: BaseModel, recipe: Recipe, error: Exception) -> ModelError:
    reason, wanted = _first_line(error), recipe.model.attention
    if wanted != "auto" and "attention implementation" in reason:
        message = f"{base.name} ({base.architecture}) cannot use model.attention={wanted}: {reason}"
        return ModelError("no-attention", message, hint="model.attention=auto")
    return ModelError("bad-base", f"{base.folder} cannot be loaded: {reason}", hint="check the folder")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _weights_missing(info: dict[str, Any], head: str) -> list[str]:
    """Return weights the checkpoint should hold; a pooler is not used by the pooled head."""
    missing = sorted(info["missing_keys"])
    return [name for name in missing if not (head == "pooled" and "pooler" in name)]


def _owners(info: dict[str, Any]) -> list[str]:
    """Return the modules that the checkpoint did not hold: they are fresh, so they must be trained."""
    keys = set(info["missing_keys"]) | {key for key, *_ in info.get("mismatched_keys", ())}
    owners = {key.rsplit(".", 1)[0] for key in keys}
    return sorted(owner for owner in owners if owner.split(".", 1)[0] not in {"classifier", "score"})


def _without_pooler(backbone: Any) -> Any:
    """Drop a pooler whose output the pooled head would not use, so that no target matches it."""
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        backbone.pooler = None
    return backbone


def _finish(model: nn.Module, peft: Any, tokenizer: Any, recipe: Recipe, device: torch.device) -> Workspace:
    _place(model.eval(), recipe.model, device)
    parameters = named_trainable(model)
    layout = layout_of((name, tuple(parameter.shape)) for name, parameter in parameters.items())
    layers = checkpointable(model) if recipe.checkpointing else ()
    autocast = None if recipe.autocast is None else DTYPES[recipe.autocast]
    base = base_layers(lora_layers(model))
    workspace = Workspace(model, peft, tokenizer, recipe.task, layout, parameters, {}, base, device, autocast, layers)
    workspace.load(initial_factors(layout, recipe.lora.init, recipe.seed))
    words = recipe.model
    if isinstance(model, PooledClassifier) and "labels" in {words.head_init, words.head_center}:
        centre, rows = words.head_center == "labels", words.head_init == "labels"
        start_from_names(model, _name_embeddings(workspace, model, recipe), centre=centre, rows=rows)
    return replace(workspace, initial=_snapshot(workspace))


def _place(model: nn.Module, words: ModelPlan, device: torch.device) -> None:
    """Move the model to its device; a quantized base is there already and only what is trained may follow."""
    if words.quantization == "none":
        model.to(device)
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)


def _snapshot(workspace: Workspace) -> AdapterState:
    return workspace.export(workspace.layout)


@torch.no_grad()
def _name_embeddings(workspace: Workspace, classifier: PooledClassifier, recipe: Recipe) -> torch.Tensor:
    """Return the base model's embedding of each label's name (labels, width)."""
    names = [LabelledText(_words(label), 0) for label in recipe.task.labels]
    examples = render_all(names, workspace.tokenizer, recipe.task, recipe.max_tokens)
    batch = collate(examples, workspace.pad_id, "classification").to(workspace.device)
    return classifier.embed(batch.input_ids, batch.attention_mask)


def _words(label: str) -> str:
    """Write a label as words: `Card_arrival?` is "card arrival"; one of other signs only stays as it is."""
    return " ".join(re.findall(r"\w+", label.replace("_", " ").lower())) or label
