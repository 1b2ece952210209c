"""Merges an adapter into its base: W = W0 + s·B·A, summed in float32, saved in the base's own type.

Refuses a base that has no exact weights (8 or 4 bit). What is saved is read back and compared with plain PEFT on real
prompts (`fedtune.release.parity`) before the folder gets its name.
"""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn

from fedtune.config.plan import StudyPlan
from fedtune.data.batches import padding_id
from fedtune.errors import ReleaseError
from fedtune.model.base import BaseModel
from fedtune.model.build import load_tokenizer
from fedtune.release.canonical import PREFIX
from fedtune.release.files import ABOUT_FILE, CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE
from fedtune.release.parity import Parity, compare, outputs

_LOADERS = {
    "none": "AutoModelForCausalLM",
    "architecture": "AutoModelForSequenceClassification",
    "pooled": "AutoModel",
}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDTHS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Tell = Callable[[str], None]


def check_mergeable(plan: StudyPlan, base: BaseModel) -> torch.dtype:
    """Return the type that a merged model is saved in. Error: `release.quantized-base`, before anything is loaded."""
    held = plan.model.quantization
    if held != "none" or "quantization_config" in base.config:
        bits = held if held != "none" else "a quantized format"
        message = f"the adapter was trained on {base.name} in {bits}; merged into other weights it is another model"
        hint = "fedtune release RUN --to peft --out DIR, or train with model.quantization=none"
        raise ReleaseError("quantized-base", message, hint=hint)
    return base_dtype(base.folder)


def base_dtype(folder: Path) -> torch.dtype:
    """Return the type of a base's weights, the widest where there are several."""
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
    known = {_DTYPES[name] for name in found if name in _DTYPES}
    return next((dtype for dtype in _WIDTHS if dtype in known), torch.float32)


def write_merged(
    plan: StudyPlan, base: BaseModel, adapter: Path, folder: Path, prompts: Sequence[str], tell: Tell
) -> Parity:
    """Write the merged model with its tokenizer into an empty folder, and return how equal it is to plain PEFT's.

    A pooled head stays beside it in `head.safetensors`; an architecture's own head is part of it.
    Errors: `release.quantized-base`, `release.no-merge`, `release.not-equal`, `release.lost-in-rounding`.
    """
    dtype, tokenizer = check_mergeable(plan, base), load_tokenizer(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and peft announce to each other
        tell(f"computing the outputs of {len(prompts)} prompts with plain PEFT")
        adapted, plain = _reference(plan, base, adapter, tokenizer, prompts)
        tell(f"merging in float32, saving in {str(dtype).removeprefix('torch.')}")
        _save_merged(plan, base, adapter, folder, tokenizer, dtype)
        tell("comparing what was saved with plain PEFT")
        merged = outputs(load_whole(plan, folder, tokenizer), tokenizer, prompts, plan.data.max_tokens)
    return compare(adapted, plain, merged, dtype)


def _save_merged(
    plan: StudyPlan, base: BaseModel, adapter: Path, folder: Path, tokenizer: Any, dtype: torch.dtype
) -> None:
    model = load_whole(plan, base.folder, tokenizer)
    _merge_into(model, adapter)
    _take_head(model, plan, adapter)
    model.to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _copy_beside(plan, adapter, folder)


def load_whole(plan: StudyPlan, folder: Path, tokenizer: Any) -> Any:
    """Load a whole model of the plan's kind in float32, with nothing of fedtune in it."""
    import transformers

    more: dict[str, Any] = {}
    if plan.model.head == "architecture":
        more = {"num_labels": len(plan.task.labels), "pad_token_id": padding_id(tokenizer)}
        more["ignore_mismatched_sizes"] = True
    loader = getattr(transformers, _LOADERS[plan.model.head])
    more |= {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    if plan.model.head == "pooled" and any(name.startswith("pooler.") for name in info["missing_keys"]):
        model.pooler = None  # drawn at random, and never used by the pooled head
    return model.eval()


def _reference(
    plan: StudyPlan, base: BaseModel, adapter: Path, tokenizer: Any, prompts: Sequence[str]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what plain PEFT computes with and without the adapter."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_whole(plan, base.folder, tokenizer), str(adapter)).eval()
    adapted = outputs(model, tokenizer, prompts, plan.data.max_tokens)
    with model.disable_adapter():
        return adapted, outputs(model, tokenizer, prompts, plan.data.max_tokens)


@torch.no_grad()
def _merge_into(model: Any, adapter: Path) -> None:
    """Add s·B·A to every adapted weight: (d_out, d_in), or (d_in, d_out) in a `Conv1D`."""
    config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    state = load_file(adapter / WEIGHTS_FILE)
    scale = config["lora_alpha"] / config["r"]
    for name in sorted(state):
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        A, B = torch.from_numpy(state[name]), torch.from_numpy(state[name.replace(".lora_A.", ".lora_B.")])
        change = scale * (B.float() @ A.float())
        module = _module(model, layer)
        module.weight.add_(change.T if _is_conv1d(module) else change)


def _module(model: Any, layer: str) -> Any:
    try:
        module = model.get_submodule(layer)
    except AttributeError as error:
        raise _no_merge(layer) from error
    if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
        raise _no_merge(layer)
    return module


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _no_merge(layer: str) -> ReleaseError:
    message = f"{layer} is no linear layer of the base model, so the adapter cannot be merged into it"
    return ReleaseError("no-merge", message, hint="release it as an adapter: --to peft")


def _take_head(model: Any, plan: StudyPlan, adapter: Path) -> None:
    """Put an architecture's trained head into the model, with the labels' names."""
    if plan.model.head != "architecture":
        return
    state = {name: array for name, array in load_file(adapter / WEIGHTS_FILE).items() if ".lora_" not in name}
    head = {name.removeprefix(PREFIX): torch.from_numpy(array) for name, array in state.items()}
    wrong = model.load_state_dict(head, strict=False).unexpected_keys
    if wrong:
        raise _no_merge(wrong[0])
    model.config.id2label = dict(enumerate(plan.task.labels))
    model.config.label2id = {label: at for at, label in enumerate(plan.task.labels)}


def _copy_beside(plan: StudyPlan, adapter: Path, folder: Path) -> None:
    """Put beside the model what it does not hold: the pooled head, and which task it is for."""
    shutil.copyfile(adapter / ABOUT_FILE, folder / ABOUT_FILE)
    if plan.model.head == "pooled":
        shutil.copyfile(adapter / HEAD_FILE, folder / HEAD_FILE)
