"""GGUF, the file format of llama.cpp and Ollama: a LoRA adapter, or a whole model, written with the package `gguf`."""

from __future__ import annotations

from fedtune.release.gguf.adapter import check_adapter, write_adapter_gguf
from fedtune.release.gguf.families import FAMILIES, Family, check_family
from fedtune.release.gguf.files import GgufFile
from fedtune.release.gguf.model import check_model, write_model_gguf

__all__ = [
    "FAMILIES",
    "Family",
    "GgufFile",
    "check_adapter",
    "check_family",
    "check_model",
    "write_adapter_gguf",
    "write_model_gguf",
]
