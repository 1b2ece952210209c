"""Random tiny models as standard Hugging Face folders, and a small labelled file: real formats in milliseconds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

_SPECIAL = ("<pad>", "<s>", "</s>")
_WORDS = ("card", "cash", "loan", "fee", "wire", "rate", "limit", "code", "app", "refund")


def tiny_base(folder: Path, architecture: str = "bert", *, seed: int = 0, **sizes: Any) -> Path:
    """Save a random model of `architecture` with a byte tokenizer into `folder`, and return the folder.

    `architecture` is bert, deberta, gpt2, llama, gemma, mistral or qwen2; the saved model has no head (encoders) or a
    language modelling head (decoders). `sizes` are fields of its configuration. Every ASCII character is one token.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    kind, wanted = _FAMILIES[architecture]
    shared = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind[0]}Config")(**{**shared, **wanted, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(transformers, f"{kind[0]}{kind[1]}")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """Return a tokenizer with one token a byte, `<pad>` 0, `<s>` 1 (put before each text) and `</s>` 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def bank_csv(path: Path, *, rows: int = 40, labels: int = 2, seed: int = 0, patients: int = 0) -> Path:
    """Write a CSV with columns `text` and `category`; the label's word is in the text, so it can be learnt.

    With `patients` there is a column `patient_id` of so many values; the first patient has half of all records.
    """
    import numpy as np

    if not 2 <= labels <= len(_WORDS):
        raise ValueError(f"labels must be 2 to {len(_WORDS)}")
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category", *(["patient_id"] if patients else [])])
        for row in range(rows):
            word = _WORDS[row % labels]
            patient = [_patient(row, rows, patients)] if patients else []
            writer.writerow([f"my {word} number {generator.integers(1000)}", word, *patient])
    return path


def question_jsonl(path: Path, *, rows: int = 40, patients: int = 0) -> Path:
    """Write JSON lines with `prompt` and `completion`, and `patient_id` as `bank_csv` does."""
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"prompt": f"what is {n}?", "completion": f" {_WORDS[n % len(_WORDS)]}"} for n in range(rows)]
    if patients:
        records = [record | {"patient_id": _patient(n, rows, patients)} for n, record in enumerate(records)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _patient(row: int, rows: int, patients: int) -> str:
    return f"patient-{max(0, row - rows // 2) % patients:03}"


_DECODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
_FAMILIES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "bert": (("Bert", "Model"), _ENCODER),
    "deberta": (("DebertaV2", "Model"), {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "gpt2": (("GPT2", "LMHeadModel"), {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}),
    "llama": (("Llama", "ForCausalLM"), _DECODER),
    "gemma": (("Gemma", "ForCausalLM"), {**_DECODER, "head_dim": 8}),
    "mistral": (("Mistral", "ForCausalLM"), {**_DECODER, "sliding_window": None}),
    "qwen2": (("Qwen2", "ForCausalLM"), _DECODER),
}
