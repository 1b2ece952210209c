"""How a base model is held and computed with: its type, attention kernel and quantization, and what is refused.

Everything is refused before a weight is read. Knows no adapter, no task and no privacy plan, but keeps records apart:
see `_QUANTIZED`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from fedtune.config.plan import ModelPlan
from fedtune.errors import ModelError
from fedtune.model.base import BaseModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FLASH = "flash_attention_2"

# bitsandbytes by transformers' own words. LLM.int8() multiplies a column apart in which *any* token of the batch has an
# outlier above the threshold: one record would change the others' gradients. Threshold 0 turns that off; each token
# is then quantized by itself. 4 bit is QLoRA's (2305.14314): NF4, scales quantized too, products in bfloat16.
_QUANTIZED: dict[str, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}


def refuse_unavailable(base: BaseModel, model: ModelPlan, autocast: str | None, device: str) -> None:
    """Raise ModelError, naming the key, for what this base or this machine cannot do."""
    if model.head == "architecture" and (model.dtype != "float32" or model.quantization != "none"):
        # PEFT trains an architecture's own head as the base is held; small noisy steps would be rounded away in it.
        held = model.dtype if model.quantization == "none" else model.quantization
        message = f"model.head=architecture cannot be trained in {held}"
        raise ModelError("head-dtype", message, hint="model.head=pooled, or model.dtype=float32 without quantization")
    _refuse_quantized(base, model, device)
    if model.attention == _FLASH:
        _refuse_flash(model, autocast, device)


def loading_options(model: ModelPlan, device: str) -> dict[str, Any]:
    """Return what `from_pretrained` is told about type, attention and quantization.

    A quantized model is put on its device while it is loaded, and must not be moved or cast afterwards.
    """
    options: dict[str, Any] = {"dtype": DTYPES[model.dtype]}
    if model.attention != "auto":
        options["attn_implementation"] = model.attention
    if model.quantization != "none":
        settings = {"quant_method": "bitsandbytes", **_QUANTIZED[model.quantization]}
        options |= {"quantization_config": settings, "device_map": {"": device}}
    return options


def _refuse_quantized(base: BaseModel, model: ModelPlan, device: str) -> None:
    if "quantization_config" in base.config:
        method = base.config["quantization_config"]
        name = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise ModelError(
            "quantized-base",
            f"{base.name} is stored quantized ({name}), in a way that may mix records",
            hint="choose the model's unquantized weights, with model.quantization=4bit or 8bit if memory is short",
        )
    if model.quantization == "none":
        return
    if device != "cuda":
        message = f"model.quantization={model.quantization} needs a CUDA GPU, this study runs on {device}"
        raise ModelError("quantization-device", message, hint="model.quantization=none, or run.device=cuda")
    if find_spec("bitsandbytes") is None:
        message = f"model.quantization={model.quantization} needs bitsandbytes, which is not installed"
        raise ModelError("no-bitsandbytes", message, hint="pip install 'fedtune[quant]'")


def _refuse_flash(model: ModelPlan, autocast: str | None, device: str) -> None:
    if device != "cuda":
        message = f"model.attention={_FLASH} needs a CUDA GPU, this study runs on {device}"
        raise ModelError("flash-device", message, hint="model.attention=sdpa")
    if find_spec("flash_attn") is None:
        message = f"model.attention={_FLASH} needs the package flash_attn, which is not installed"
        raise ModelError("no-flash", message, hint="pip install flash-attn, or model.attention=sdpa")
    if model.dtype == "float32" and autocast is None:
        message = f"model.attention={_FLASH} does not compute in float32"
        raise ModelError("flash-dtype", message, hint="training.autocast=bfloat16 or model.dtype=bfloat16")
