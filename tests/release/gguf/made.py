"""Random tiny models of every family with a tokenizer that llama.cpp has, and adapters that change every layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "gemma", "gemma2", "gpt2")
_CORPUS = [
    "Once upon a time there was a little girl named Lily who went to the park to play.",
    "The patient's blood pressure was 120/80 mmHg; I'm sure it won't rise again, they'll see.",
    "Please transfer 1250 euros to the account of the hospital before Friday.",
    "    indented code():\n\treturn value + 1\n\n",
    "Überweisung an Müller, naïve café, коротко 你好",
] * 3
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15,
}  # fmt: skip
_GEMMA = {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"}
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "spm", {**_SIZES, "attention_bias": True, "tie_word_embeddings": False}),
    "llama3": ("Llama", "llama-bpe", {**_SIZES, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral": ("Mistral", "spm", {**_SIZES, "head_dim": 32, "sliding_window": 100}),
    "qwen2": ("Qwen2", "qwen2", _SIZES),
    "gemma": ("Gemma", "spm-bare", {**_SIZES, **_GEMMA}),
    "gemma2": ("Gemma2", "spm-bare", {**_SIZES, **_GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 8,
                                      "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gpt2": ("GPT2", "gpt-2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.15}),
}  # fmt: skip
_CLASSES = {"GPT2": "GPT2LMHeadModel"}


def made_base(folder: Path, family: str, *, seed: int = 3, **sizes: Any) -> Path:
    """Save a random model of a family, in float32, with its tokenizer."""
    import torch
    import transformers

    name, rule, wanted = _MODELS[family]
    tokenizer = made_tokenizer(rule)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": len(tokenizer) + 3, **ids, **wanted, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, _CLASSES.get(name, f"{name}ForCausalLM"))(config)
        for parameter in model.parameters():  # norms and biases too: all zeros or ones would hide a mistake
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def made_adapter(folder: Path, base: Path, *, targets: list[str] | str = "all-linear", rank: int = 4) -> Path:
    """Save a plain PEFT adapter for a base whose A and B are both random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    gpt2 = model.config.model_type == "gpt2"
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=gpt2)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.08)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"target_modules": sorted(saved["target_modules"])}))
    return folder


def adapted_model(base: Path, adapter: Path | None = None) -> Any:
    """Load what `transformers` and PEFT compute with, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


def logits_of(model: Any, ids: list[int]) -> Any:
    """Return (tokens, vocabulary) of one prompt as NumPy."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def greedy_of(model: Any, ids: list[int], steps: int) -> list[int]:
    """Continue greedily, whatever ends a text, by plain forward passes."""
    import torch

    with torch.no_grad():
        out, past = model(torch.tensor([ids]), use_cache=True), []
        for _ in range(steps):
            past.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([[past[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return past


def made_tokenizer(rule: str) -> Any:
    """Train a small tokenizer that cuts texts by one of llama.cpp's rules."""
    from transformers import PreTrainedTokenizerFast

    backend = _sentencepiece(bare=rule == "spm-bare") if rule.startswith("spm") else _byte_level(rule)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if not rule.startswith("spm"):
        del names["unk_token"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _sentencepiece(*, bare: bool) -> Any:
    """A byte-fallback BPE whose merges hold every split of a piece by rank, as a converted SentencePiece model's do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    words = [f"\u2581{word}" for text in _CORPUS for word in text.split()]
    pieces = dict.fromkeys(sorted({character for word in words for character in word}))
    grown = dict.fromkeys(word[:end] for word in words for end in range(2, min(len(word), 7) + 1))
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokens += [piece for piece in sorted(grown, key=len) if piece not in pieces]
    vocabulary = {token: at for at, token in enumerate(dict.fromkeys(tokens))}
    splits = [(piece[:at], piece[at:]) for piece in vocabulary for at in range(1, len(piece)) if piece[0] != "<"]
    merges = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [] if bare else [normalizers.Prepend("\u2581")]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strips = [] if bare else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strips]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def _byte_level(rule: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    if rule == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        digits = r"\p{N}{1,3}" if rule == "llama-bpe" else r"\p{N}"
        split = pre_tokenizers.Split(Regex(_ENGLISH + digits + _TAIL), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if rule == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend
