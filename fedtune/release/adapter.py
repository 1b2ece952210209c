"""The release: a PEFT folder that other tools load, the pooled head beside it, and what is needed to use both.

`adapter_config.json` and `adapter_model.safetensors` are plain PEFT. `head.safetensors` is the pooled head, which PEFT
does not know; `fedtune.json` says which task, base and head belong to them; `README.md` is the card.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedtune.config.plan import StudyPlan
from fedtune.errors import ModelError, RunError
from fedtune.model.layout import AdapterState
from fedtune.model.workspace import Workspace
from fedtune.release.card import render_card
from fedtune.run.files import disk_errors, write_whole

HEAD_FILE = "head.safetensors"
WEIGHTS_FILE = "adapter_model.safetensors"
ABOUT_FILE = "fedtune.json"
CENTRE = "centre"  # what the pooled head subtracts from every embedding: a fact of base and labels, not trained


def save_adapter(
    folder: Path, workspace: Workspace, adapter: AdapterState, plan: StudyPlan, summary: dict[str, Any]
) -> None:
    """Write the release of an adapter, and read it back: what is saved must be what was trained.

    Errors: `model.dead-adapter` when training changed nothing, `model.not-saved` when the folder holds other numbers.
    """
    full = {**workspace.initial, **adapter}
    _refuse_dead(workspace, full, private=plan.promise.mode == "dp")
    workspace.load(full)
    _save_peft(folder, workspace, plan.model.name)
    if head := {name: full[name] for name in workspace.layout.names if name.startswith("head.")}:
        centre = getattr(workspace.model, "centre", None)
        extra = {} if centre is None else {CENTRE: centre.cpu().numpy()}
        write_whole(folder / HEAD_FILE, save({**head, **extra}))
    write_whole(folder / ABOUT_FILE, (json.dumps(_about(plan), indent=2, ensure_ascii=False) + "\n").encode())
    write_whole(folder / "README.md", render_card(plan, summary).encode())
    _check_saved(folder, full)


def load_adapter(folder: Path) -> AdapterState:
    """Read a released adapter's tensors by canonical name."""
    try:
        state = load_file(folder / WEIGHTS_FILE)
        head = load_file(folder / HEAD_FILE) if (folder / HEAD_FILE).exists() else {}
        return {**state, **{name: tensor for name, tensor in head.items() if name != CENTRE}}
    except (OSError, SafetensorError) as error:
        hint = "finish the study first: fedtune simulate --resume RUN"
        raise RunError("no-adapter", f"{folder} holds no released adapter", hint=hint) from error


def _save_peft(folder: Path, workspace: Workspace, base: str) -> None:
    """Write PEFT's own two files; its default would ask the Hub about the base's vocabulary."""
    with disk_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder.mkdir(parents=True, exist_ok=True)
        workspace.peft.peft_config["default"].base_model_name_or_path = base
        try:
            workspace.peft.save_pretrained(str(folder), save_embedding_layers=False)
        except SafetensorError as error:
            hint = "free some space, then continue with fedtune simulate --resume RUN"
            slug = "disk-full" if "(os error 28)" in str(error) else "not-written"  # safetensors has no errno
            raise RunError(slug, f"{folder / WEIGHTS_FILE} cannot be written ({error})", hint=hint) from error


def _about(plan: StudyPlan) -> dict[str, Any]:
    return {
        "plan_sha256": plan.sha256,
        "task": plan.data.task,
        "max_tokens": plan.data.max_tokens,
        "base": plan.model.model_dump(mode="json"),
        "lora": plan.lora.model_dump(mode="json"),
    }


def _refuse_dead(workspace: Workspace, adapter: AdapterState, *, private: bool) -> None:
    """Refuse an adapter in which no B has moved from zero.

    Noise moves every B. Without noise a head that has moved may do alone: one that starts at zero passes no gradient
    on in the first step, and one that solves the task passes none on afterwards.
    """
    tensors = workspace.layout.tensors
    lives = any(np.any(adapter[spec.name]) for spec in tensors if spec.role == "lora_B")
    heads = [spec.name for spec in tensors if spec.role == "head"]
    learnt = any(not np.array_equal(adapter[name], workspace.initial[name]) for name in heads)
    if not lives and (private or not learnt):
        raise ModelError(
            "dead-adapter", "every LoRA B is still zero after training", hint="raise training.learning_rate"
        )


def _check_saved(folder: Path, adapter: AdapterState) -> None:
    saved = load_adapter(folder)
    if saved.keys() != adapter.keys() or any(not np.array_equal(saved[name], adapter[name]) for name in adapter):
        raise ModelError("not-saved", f"{folder} does not hold the trained adapter", hint="use the pinned peft version")
