"""Byte-level BPE (GPT-2, Llama 3, Qwen 2, …): which of llama.cpp's cutting rules is this tokenizer's.

The rule is found by the regular expressions in the tokenizer's definition. llama.cpp's copies of them are part of its
code under the names below; a rule that is not among them is refused, since tokens would differ silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedtune.release.gguf.tokenizer import Vocabulary, padded, unknown_tokenizer

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Rule:
    """A cutting rule of llama.cpp: its name, the steps in `tokenizer.json`, and whether whole words skip the merges."""

    pre: str
    steps: tuple[tuple[str, ...], ...]
    ignores_merges: bool = False
    composes: bool = False


_OWN = ("ByteLevel", "own rule")
_BYTES = ("ByteLevel", "bytes only")
_RULES = (
    _Rule("gpt-2", (_OWN,)),
    _Rule("llama-bpe", (("Split", _ENGLISH + r"|\p{N}{1,3}" + _TAIL), _BYTES), ignores_merges=True),
    _Rule("qwen2", (("Split", _ENGLISH + r"|\p{N}" + _TAIL), _BYTES), composes=True),
    _Rule("qwen2", (("Split", _ENGLISH + r"|\p{N}" + _TAIL), _BYTES)),
    _Rule("tekken", (("Split", _TEKKEN), _BYTES), ignores_merges=True),
    _Rule("smollm", (("Digits", "single"), _OWN)),
)


def byte_level_vocabulary(definition: dict[str, Any], typed: dict[int, tuple[str, int]], rows: int) -> Vocabulary:
    """Return the vocabulary of a byte-level BPE under the rule that its definition states."""
    model = definition["model"]
    rule = _rule_of(definition)
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise unknown_tokenizer(f"sets {key}")
    tokens, types = padded(typed, rows)
    merges = tuple(" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"])
    return Vocabulary("gpt2", rule.pre, tokens, types, merges=merges)


def _rule_of(definition: dict[str, Any]) -> _Rule:
    steps = tuple(_step(step) for step in _sequence(definition.get("pre_tokenizer"), "pretokenizers"))
    changes = [step["type"] for step in _sequence(definition.get("normalizer"), "normalizers")]
    ignores = bool(definition["model"].get("ignore_merges", False))
    for rule in _RULES:
        if (rule.steps, rule.ignores_merges, ["NFC"] if rule.composes else []) == (steps, ignores, changes):
            return rule
    raise unknown_tokenizer(f"cuts texts by {steps} after {changes or 'no change'}")


def _sequence(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _step(step: dict[str, Any]) -> tuple[str, ...]:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use}:
            return _OWN if use else _BYTES
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
            return ("Split", rule)
        case {"type": "Digits", "individual_digits": True}:
            return ("Digits", "single")
        case _:
            return (step["type"], "with other options")
