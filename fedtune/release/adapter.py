"""A trained adapter as a folder: plain PEFT, the pooled head beside it, and what is needed to use both.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's, in the one form of `fedtune.release.canonical`; a
sequence classifier's own head is part of them, as PEFT loads it. `head.safetensors` is the pooled head, which PEFT does
not know; `fedtune.json` says which task, base and scale belong to them; `README.md` is the card.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedtune.config.plan import StudyPlan
from fedtune.config.schema import LoraSettings
from fedtune.errors import ModelError, RunError
from fedtune.model.layout import AdapterState, TensorSpec
from fedtune.model.workspace import Workspace
from fedtune.release.canonical import PREFIX, Form, configuration, explicit_targets, form_of, scale_back
from fedtune.release.card import render_card
from fedtune.release.files import ABOUT_FILE, CARD_FILE, CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE, whole_folder
from fedtune.run.files import write_whole

CENTRE = "centre"  # what the pooled head subtracts from every embedding: a fact of base and labels, not trained
_ROUNDING = 1e-6  # a folded B is rounded twice


def save_adapter(
    folder: Path, workspace: Workspace, adapter: AdapterState, plan: StudyPlan, summary: dict[str, Any]
) -> None:
    """Write an adapter, and read it back before the folder takes its place: what is saved must be what was trained.

    Every layer's A (R, d_in) and B (d_out, R) have one rank R, the plan's or any other, in the study's scale s:
    W = W0 + s·B·A. An earlier folder is replaced. Errors: `model.dead-adapter` when training changed nothing,
    `model.wrong-shape`, `model.unknown-tensor`, `model.not-saved` when the folder holds other numbers.
    """
    full = _complete(workspace, adapter)
    _refuse_dead(workspace, full, private=plan.promise.mode == "dp")
    form = form_of(plan.lora, _common_rank(workspace, full))
    config = _config(workspace, plan, form)
    about = {**_about(plan), "pad_id": workspace.pad_id}
    with whole_folder(folder, replace=True) as made:
        _write_json(made / CONFIG_FILE, config)
        write_whole(made / WEIGHTS_FILE, save(_peft_tensors(full, form), metadata={"format": "pt"}))
        if head := _pooled_head(workspace, full):
            write_whole(made / HEAD_FILE, save(head, metadata={"format": "pt"}))
        _write_json(made / ABOUT_FILE, about)
        write_whole(made / CARD_FILE, render_card(plan, summary, pad_id=workspace.pad_id).encode())
        _check_saved(made, full, exact=form.fold == 1)


def load_adapter(folder: Path) -> AdapterState:
    """Read a released adapter's tensors by canonical name, in the study's scale; their rank may be any.

    Error: `run.no-adapter`.
    """
    try:
        state = load_file(folder / WEIGHTS_FILE)
        head = load_file(folder / HEAD_FILE) if (folder / HEAD_FILE).exists() else {}
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        factor = scale_back(config, LoraSettings.model_validate(about["lora"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        hint = "finish the study first: fedtune simulate --resume RUN"
        raise RunError("no-adapter", f"{folder} holds no released adapter", hint=hint) from error
    factors = {name: _times(array, factor) if _is_b(name) else array for name, array in state.items()}
    return {**factors, **{name: tensor for name, tensor in head.items() if name != CENTRE}}


def rank_of(adapter: AdapterState) -> int:
    """Return the rank of a released adapter, one for all layers."""
    return next(int(array.shape[1]) for name, array in adapter.items() if _is_b(name))


def _complete(workspace: Workspace, adapter: AdapterState) -> dict[str, Any]:
    """Return A, B and head of every layer; what the adapter does not name is as it was at the start."""
    wanted = [spec.name for spec in workspace.layout.tensors if spec.role != "lora_R"]
    if unknown := sorted(adapter.keys() - set(wanted)):
        raise ModelError("unknown-tensor", f"the adapted model has no tensor {unknown[0]!r:.80}")
    return {name: np.asarray(adapter.get(name, workspace.initial.get(name)), np.float32) for name in wanted}


def _common_rank(workspace: Workspace, full: AdapterState) -> int:
    """Return R after checking every shape against the layer's: A (R, d_in), B (d_out, R), a head as it is."""
    rank = rank_of(full)
    for spec in workspace.layout.tensors:
        if spec.role != "lora_R" and full[spec.name].shape != (shape := _shape(spec, rank)):
            raise ModelError("wrong-shape", f"{spec.name} has shape {full[spec.name].shape}, not {shape}")
    return rank


def _shape(spec: TensorSpec, rank: int) -> tuple[int, ...]:
    if spec.role == "lora_A":
        return rank, spec.shape[1]
    return (spec.shape[0], rank) if spec.role == "lora_B" else spec.shape


def _config(workspace: Workspace, plan: StudyPlan, form: Form) -> dict[str, Any]:
    from peft.utils import ModulesToSaveWrapper

    own = workspace.peft.peft_config["default"]
    layers = [spec_b.layer.removeprefix(PREFIX) for _, spec_b in workspace.layout.pairs]
    modules = dict(workspace.peft.get_base_model().named_modules())
    targets = explicit_targets(layers, modules)
    whole = [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]
    more: dict[str, Any] = {"lora_dropout": plan.lora.dropout, "fan_in_fan_out": bool(own.fan_in_fan_out)}
    more["modules_to_save"] = sorted(whole) or None
    return configuration(plan.model.name, plan.model.head, form, targets, **more)


def _peft_tensors(full: AdapterState, form: Form) -> dict[str, Any]:
    peft = {name: array for name, array in full.items() if name.startswith(PREFIX)}
    return {name: _times(array, form.fold) if _is_b(name) else array for name, array in peft.items()}


def _pooled_head(workspace: Workspace, full: AdapterState) -> dict[str, Any]:
    """Return what was trained outside of the PEFT model."""
    head: dict[str, Any] = {name: array for name, array in full.items() if not name.startswith(PREFIX)}
    centre = getattr(workspace.model, "centre", None)
    return head if centre is None else {**head, CENTRE: centre.cpu().numpy()}


def _about(plan: StudyPlan) -> dict[str, Any]:
    return {
        "plan_sha256": plan.sha256,
        "task": plan.data.task,
        "max_tokens": plan.data.max_tokens,
        "base": plan.model.model_dump(mode="json"),
        "lora": plan.lora.model_dump(mode="json"),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())


def _is_b(name: str) -> bool:
    return name.endswith(".lora_B.weight")


def _times(array: Any, factor: float) -> Any:
    return array if factor == 1 else (np.asarray(array, np.float64) * factor).astype(np.float32)


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


def _check_saved(folder: Path, adapter: AdapterState, *, exact: bool) -> None:
    saved = load_adapter(folder)
    same = saved.keys() == adapter.keys() and all(
        np.array_equal(saved[name], adapter[name])
        if exact or not _is_b(name)
        else np.allclose(saved[name], adapter[name], rtol=_ROUNDING, atol=0)
        for name in adapter
    )
    if not same:
        raise ModelError("not-saved", f"{folder} does not hold the trained adapter", hint="use the pinned peft version")
