"""Builds a workspace: base model, LoRA, head and start, from the plan's words and a folder of this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fedtune.config.schema import LoraSettings
from fedtune.data.batches import collate, padding_id
from fedtune.data.records import LabelledText
from fedtune.data.tasks import Task
from fedtune.data.templates import render_all
from fedtune.errors import ModelError
from fedtune.model.adapters import adapt, initial_factors, layout_of
from fedtune.model.base import BaseModel
from fedtune.model.heads import PooledClassifier, start_from_names
from fedtune.model.layout import AdapterState
from fedtune.model.workspace import Workspace, named_trainable

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides an adapted model, except the base's content."""

    task: Task
    lora: LoraSettings
    head: str
    head_init: str
    head_center: str
    head_scale: float
    dtype: str
    seed: int
    max_tokens: int


@lru_cache(maxsize=1)
def build(base: BaseModel, recipe: Recipe, device: str) -> Workspace:
    """Build, or return the one that this process has already built for the same base and recipe."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _refuse(base, recipe)
    tokenizer = load_tokenizer(base)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed % 2**32)  # only fresh modules of an architecture's own head are drawn from it
        model, peft = _assemble(base, recipe, tokenizer)
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


def _refuse(base: BaseModel, recipe: Recipe) -> None:
    """Refuse what can be seen to be impossible before anything is loaded."""
    check_length(base, recipe.max_tokens)
    if base.config.get("is_encoder_decoder"):
        message = f"{base.name} is an encoder-decoder ({base.architecture}), which fedtune does not train"
        raise ModelError("encoder-decoder", message, hint="choose an encoder or a decoder as model.base")
    if recipe.head == "architecture" and recipe.head_init == "labels":
        raise ModelError("no-pooled-head", "model.head_init=labels needs the pooled head", hint="model.head=pooled")
    if recipe.head == "architecture" and recipe.dtype != "float32":
        # PEFT trains an architecture's own head in the base's type; small noisy steps would be rounded away in it.
        message = f"model.head=architecture cannot be trained in {recipe.dtype}"
        raise ModelError("head-dtype", message, hint="model.head=pooled or model.dtype=float32")


def _assemble(base: BaseModel, recipe: Recipe, tokenizer: Any) -> tuple[nn.Module, Any]:
    if recipe.head == "pooled":
        backbone = _without_pooler(_load(base, recipe, tokenizer, "AutoModel")[0])
        width = int(backbone.config.hidden_size)
        peft = adapt(backbone, recipe.lora, recipe.head, ())
        return PooledClassifier(peft, width, len(recipe.task.labels), recipe.head_scale), peft
    kind = "AutoModelForCausalLM" if recipe.head == "none" else "AutoModelForSequenceClassification"
    model, fresh = _load(base, recipe, tokenizer, kind)
    peft = adapt(model, recipe.lora, recipe.head, fresh if recipe.head == "architecture" else ())
    return peft, peft


def _load(base: BaseModel, recipe: Recipe, tokenizer: Any, kind: str) -> tuple[Any, list[str]]:
    import transformers

    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "dtype": _DTYPES[recipe.dtype]}
    if recipe.head == "architecture":
        # A decoder's head reads the last token that is not this one: it must be the token that batches are filled with,
        # or a record's logits would depend on how long the other records are.
        settings |= {"pad_token_id": padding_id(tokenizer)}
        settings |= {"num_labels": len(recipe.task.labels), "ignore_mismatched_sizes": True}
    try:
        loader = getattr(transformers, kind)
        model, info = loader.from_pretrained(base.folder, use_safetensors=True, output_loading_info=True, **settings)
    except Exception as error:  # a broken folder makes transformers fail in many ways
        raise ModelError(
            "bad-base", f"{base.folder} cannot be loaded: {_first_line(error)}", hint="check the folder"
        ) from error
    if recipe.head != "architecture" and (missing := _weights_missing(info, recipe.head)):
        raise ModelError(
            "missing-weights", f"{base.name} lacks {', '.join(missing[:3])}", hint="choose another model.base"
        )
    return model, _owners(info)


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
    model.eval().to(device)
    parameters = named_trainable(model)
    layout = layout_of((name, tuple(parameter.shape)) for name, parameter in parameters.items())
    workspace = Workspace(model, peft, tokenizer, recipe.task, layout, parameters, {}, device)
    workspace.load(initial_factors(layout, recipe.lora.init, recipe.seed))
    if isinstance(model, PooledClassifier) and "labels" in {recipe.head_init, recipe.head_center}:
        centre, rows = recipe.head_center == "labels", recipe.head_init == "labels"
        start_from_names(model, _name_embeddings(workspace, model, recipe), centre=centre, rows=rows)
    return Workspace(model, peft, tokenizer, recipe.task, layout, parameters, _snapshot(workspace), device)


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
