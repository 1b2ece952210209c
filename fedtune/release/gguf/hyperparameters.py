"""The numbers of a model's architecture as GGUF metadata, and a refusal of those that llama.cpp would not follow.

llama.cpp hard-wires what a family usually does (activation, biases, which layers slide). A configuration that departs
from it would load and compute something else, so it is refused here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.errors import ReleaseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gguf import GGUFWriter
    from numpy.typing import NDArray

    from fedtune.release.gguf.families import Family

_ACTIVATIONS = {
    "llama": {"silu"},
    "qwen2": {"silu"},
    "gemma": {"gelu_pytorch_tanh", "gelu"},  # Gemma's "gelu" has always been computed as its tanh form
    "gemma2": {"gelu_pytorch_tanh"},
    "gpt2": {"gelu_new", "gelu_pytorch_tanh"},
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_GEMMA2_27B_LAYERS = 46  # llama.cpp takes the 27B model's own attention scale from this number of layers


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """A decoder's sizes: `width` of the residual, `inner` of the feed-forward layer, `context` in tokens.

    `rotary_factors` (head / 2,) divide the rotary frequencies (Llama 3); `rotary_scale` divides positions (linear).
    `window` is the sliding window of the layers that have one. None where a family has no such thing.
    """

    layers: int
    width: int
    inner: int
    heads: int
    key_value_heads: int
    head: int
    context: int
    vocabulary: int
    epsilon: float
    tied: bool
    theta: float | None = None
    rotary_scale: float | None = None
    rotary_factors: NDArray[np.float32] | None = None
    window: int | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None


def read_hyperparameters(config: Mapping[str, Any], family: Family) -> Hyperparameters:
    """Read and check a `config.json`; errors: `release.gguf-config` names the key that llama.cpp would not follow."""
    if family.model_type == "gpt2":
        return _gpt2(config)
    return _rotary(config, family)


def add_hyperparameters(writer: GGUFWriter, family: Family, sizes: Hyperparameters) -> None:
    """Write the sizes under the keys of the family's architecture."""
    writer.add_block_count(sizes.layers)
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.width)
    writer.add_feed_forward_length(sizes.inner)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.key_value_heads)
    writer.add_vocab_size(sizes.vocabulary)
    if family.model_type == "gpt2":
        writer.add_layer_norm_eps(sizes.epsilon)
        return
    writer.add_layer_norm_rms_eps(sizes.epsilon)
    writer.add_key_length(sizes.head)
    writer.add_value_length(sizes.head)
    writer.add_rope_dimension_count(sizes.head)
    writer.add_rope_freq_base(float(sizes.theta or 0.0))
    _add_optional(writer, sizes)


def _add_optional(writer: GGUFWriter, sizes: Hyperparameters) -> None:
    import gguf

    if sizes.rotary_scale is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(sizes.rotary_scale)
    if sizes.window is not None:
        writer.add_sliding_window(sizes.window)
    if sizes.attention_cap is not None and sizes.logit_cap is not None:
        writer.add_attn_logit_softcapping(sizes.attention_cap)
        writer.add_final_logit_softcapping(sizes.logit_cap)


def _gpt2(config: Mapping[str, Any]) -> Hyperparameters:
    _want(config, "activation_function", _ACTIVATIONS["gpt2"], "gelu_new")
    _want(config, "scale_attn_weights", {True}, default=True)
    _want(config, "scale_attn_by_inverse_layer_idx", {False}, default=False)
    _want(config, "add_cross_attention", {False}, default=False)
    width, heads = int(config["n_embd"]), int(config["n_head"])
    return Hyperparameters(
        layers=int(config["n_layer"]),
        width=width,
        inner=int(config.get("n_inner") or 4 * width),
        heads=heads,
        key_value_heads=heads,
        head=width // heads,
        context=int(config["n_positions"]),
        vocabulary=int(config["vocab_size"]),
        epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def _rotary(config: Mapping[str, Any], family: Family) -> Hyperparameters:
    activation = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    usual = "gelu_pytorch_tanh" if family.shifts_norm else "silu"
    _want(config, activation, _ACTIVATIONS[family.architecture], usual)
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head = int(config.get("head_dim") or width // heads)
    if family.model_type == "qwen2" and head * heads != width:
        raise _departs("head_dim", head, f"{width // heads}, the width by heads")
    theta, scale, factors = _rope(config, head)
    window = _window(config, family)
    context = int(config["max_position_embeddings"])
    return Hyperparameters(
        layers=int(config["num_hidden_layers"]),
        width=width,
        inner=int(config["intermediate_size"]),
        heads=heads,
        key_value_heads=int(config.get("num_key_value_heads") or heads),
        head=head,
        # llama.cpp slides no window in these families; up to the window's length there is no difference.
        context=context if window is None or family.model_type == "gemma2" else min(context, window),
        vocabulary=int(config["vocab_size"]),
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", family.shifts_norm)),
        theta=theta,
        rotary_scale=scale,
        rotary_factors=factors,
        window=window if family.model_type == "gemma2" else None,
        **(_gemma2(config, head) if family.model_type == "gemma2" else {}),
    )


def _gemma2(config: Mapping[str, Any], head: int) -> dict[str, float]:
    """Check what llama.cpp hard-wires for Gemma 2, and return the two caps."""
    layers, width, heads = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    scaled_by = width // heads if layers == _GEMMA2_27B_LAYERS else head
    _want(config, "query_pre_attn_scalar", {scaled_by}, default=256)
    sliding = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
    if config.get("layer_types", sliding) != sliding:
        raise _departs("layer_types", "another order", "sliding and full layers in turn")
    caps = {"attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
    if missing := [key for key in caps.values() if not config.get(key)]:
        raise _departs(missing[0], config.get(missing[0]), "a number")
    return {name: float(config[key]) for name, key in caps.items()}


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    window = config.get("sliding_window")
    if not window or (family.model_type == "qwen2" and not config.get("use_sliding_window", False)):
        return None
    return int(window)


def _rope(config: Mapping[str, Any], head: int) -> tuple[float, float | None, NDArray[np.float32] | None]:
    """Return θ, the linear scale and Llama 3's factors, from either place where `transformers` keeps them."""
    stated = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(stated.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if float(stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise _departs("partial_rotary_factor", "a part of the head", "the whole head")
    match stated.get("rope_type", stated.get("type", "default")):
        case "default":
            return theta, None, None
        case "linear":
            return theta, float(stated["factor"]), None
        case "llama3":
            return theta, None, llama3_factors(theta, head, *(float(stated[key]) for key in _LLAMA3_KEYS))
        case other:
            raise _departs("rope_type", other, "default, linear or llama3")


def llama3_factors(
    theta: float, head: int, factor: float, low: float, high: float, trained: float
) -> NDArray[np.float32]:
    """Return by what Llama 3 divides each rotary frequency, (head / 2,): 1 for short waves, `factor` for long ones.

    Between wavelengths trained/high and trained/low the frequency itself is interpolated.
    """
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    smooth = np.clip((trained / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _want(config: Mapping[str, Any], key: str, allowed: set[Any], default: object) -> None:
    found = config.get(key, default)
    if found not in allowed:
        raise _departs(key, found, " or ".join(str(value) for value in sorted(allowed, key=str)))


def _departs(key: str, found: object, wanted: str) -> ReleaseError:
    return ReleaseError(
        "gguf-config",
        f"the base's config.json has {key}={found}; llama.cpp computes this family with {wanted}",
        hint="use transformers: fedtune release RUN --to merged",
    )
