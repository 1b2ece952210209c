"""What llama.cpp computes from a GGUF file, in NumPy and float64: a reference of its own for every family.

Written from the meaning of the file's tensors and keys alone; shares nothing with what writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

Array = np.ndarray


class Opened:
    """Keys and dequantised tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.architecture: str = self.keys["general.architecture"]
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]).astype(np.float64)
            for tensor in reader.tensors
        }

    def key(self, name: str, default: Any = None) -> Any:
        return self.keys.get(f"{self.architecture}.{name}", default)


def logits(model: Opened, ids: list[int], adapter: Opened | None = None) -> Array:
    """Return (tokens, vocabulary)."""
    return _Pass(model, adapter).run(ids)


class _Pass:
    def __init__(self, model: Opened, adapter: Opened | None) -> None:
        self.model, self.adapter = model, adapter
        self.gemma = model.architecture.startswith("gemma")
        self.gpt2 = model.architecture == "gpt2"
        self.heads = int(model.key("attention.head_count"))
        self.groups = int(model.key("attention.head_count_kv"))
        self.head = int(model.key("attention.key_length", model.key("embedding_length") // self.heads))

    def run(self, ids: list[int]) -> Array:
        tensors = self.model.tensors
        x = tensors["token_embd.weight"][ids]
        if self.gemma:
            x = x * np.sqrt(x.shape[1])
        if self.gpt2:
            x = x + tensors["position_embd.weight"][: len(ids)]
        for layer in range(int(self.model.key("block_count"))):
            x = self.block(x, f"blk.{layer}.", layer)
        x = self.norm(x, "output_norm")
        out = self.matmul(x, "output" if "output.weight" in tensors else "token_embd")
        cap = self.model.key("final_logit_softcapping")
        return out if cap is None else cap * np.tanh(out / cap)

    def block(self, x: Array, at: str, layer: int) -> Array:
        mixed = self.attention(self.norm(x, f"{at}attn_norm"), at, layer)
        x = x + self.after(mixed, f"{at}post_attention_norm")
        return x + self.after(self.feed_forward(self.norm(x, f"{at}ffn_norm"), at), f"{at}post_ffw_norm")

    def after(self, x: Array, name: str) -> Array:
        return self.norm(x, name) if f"{name}.weight" in self.model.tensors else x

    def feed_forward(self, x: Array, at: str) -> Array:
        up = self.matmul(x, f"{at}ffn_up")
        if self.gpt2:
            return self.matmul(_gelu(up), f"{at}ffn_down")
        gate = self.matmul(x, f"{at}ffn_gate")
        gate = _gelu(gate) if self.gemma else gate / (1 + np.exp(-gate))
        return self.matmul(gate * up, f"{at}ffn_down")

    def attention(self, x: Array, at: str, layer: int) -> Array:
        if self.gpt2:
            q, k, v = np.split(self.matmul(x, f"{at}attn_qkv"), 3, axis=1)
        else:
            q, k, v = (self.matmul(x, f"{at}attn_{part}") for part in "qkv")
        q, k, v = (part.reshape(len(x), -1, self.head) for part in (q, k, v))
        if not self.gpt2:
            q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat(self.heads // self.groups, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(self.head)
        if cap := self.model.key("attn_logit_softcapping"):
            scores = cap * np.tanh(scores / cap)
        scores = np.where(self.visible(len(x), layer), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self.matmul(np.einsum("hij,jhd->ihd", weights, v).reshape(len(x), -1), f"{at}attn_output")

    def visible(self, length: int, layer: int) -> Array:
        distance = np.arange(length)[:, None] - np.arange(length)[None]
        window = self.model.key("attention.sliding_window") if layer % 2 == 0 else None
        return (distance >= 0) & (distance < (window or length + 1))

    def rotate(self, x: Array) -> Array:
        """Turn neighbours (Llama's order in GGUF) or halves (all others) by position times frequency."""
        frequency = float(self.model.key("rope.freq_base")) ** (-np.arange(0, self.head, 2) / self.head)
        frequency /= self.model.tensors.get("rope_freqs.weight", 1.0)
        frequency /= float(self.model.key("rope.scaling.factor", 1.0))
        angle = (np.arange(len(x))[:, None] * frequency)[:, None]
        pairs = (slice(0, None, 2), slice(1, None, 2))
        if self.model.architecture != "llama":
            pairs = (slice(0, self.head // 2), slice(self.head // 2, None))
        turned, (a, b) = np.empty_like(x), (x[..., part] for part in pairs)
        turned[..., pairs[0]] = a * np.cos(angle) - b * np.sin(angle)
        turned[..., pairs[1]] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    def norm(self, x: Array, name: str) -> Array:
        weight = self.model.tensors[f"{name}.weight"]
        if self.gpt2:
            x = x - x.mean(-1, keepdims=True)
            scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.model.key("attention.layer_norm_epsilon"))
            return x / scale * weight + self.model.tensors[f"{name}.bias"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.model.key("attention.layer_norm_rms_epsilon")) * weight

    def matmul(self, x: Array, name: str) -> Array:
        out = x @ self.model.tensors[f"{name}.weight"].T + self.model.tensors.get(f"{name}.bias", 0.0)
        if self.adapter is None or f"{name}.weight.lora_a" not in self.adapter.tensors:
            return out
        a, b = (self.adapter.tensors[f"{name}.weight.lora_{side}"] for side in "ab")
        return out + self.adapter.keys["adapter.lora.alpha"] / len(a) * (x @ a.T @ b.T)


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
