"""SentencePiece BPE (Llama 2, Mistral, Gemma, …): merges as scores, and a check of the tokens it gives.

`transformers` merges by rank of a pair, llama.cpp by score of the piece that a pair makes. A piece's score is
therefore minus the rank of the first merge that makes it. `pieces` computes what llama.cpp does, so that a vocabulary
for which the two differ is found before it is written.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from fedtune.errors import ReleaseError
from fedtune.release.gguf.tokenizer import NORMAL, Vocabulary, padded, unknown_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

_SPACE = "\u2581"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_PROBES = (
    "Once upon a time, there was a little girl named Lily.",
    "The patient's blood pressure was 120/80 mmHg at 09:15.",
    "  two leading spaces, a\ttab and\n\na blank line\n",
    "Überweisung über 1.234,56 € an «Müller & Söhne»",
    "def f(x):\n    return x ** 2  # twelve",
    "日本語のテキスト и русский текст 🦙",
    "ALL CAPITALS, lower, MiXeD; don't won't I'm",
    "Question: what is it?\n\nAnswer:\n",
    "aaaaaaaaaaaaaaaa bbbbbbbb ........ ------",
)


def sentencepiece_vocabulary(definition: dict[str, Any], typed: dict[int, tuple[str, int]], rows: int) -> Vocabulary:
    """Return the vocabulary of a byte-fallback BPE; refuses text rules other than `▁` for a space."""
    tokens, types = padded(typed, rows)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(definition["model"]["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault(left + right, rank)
    unmerged = -float(len(definition["model"]["merges"]))
    scores = tuple(
        float(-ranks[text]) if kind == NORMAL and text in ranks else (unmerged if kind == NORMAL else 0.0)
        for text, kind in zip(tokens, types, strict=True)
    )
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=_space_prefix(definition))


def check_pieces(vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Compare llama.cpp's tokens with the tokenizer's own; error: `release.tokenizer-differs` names a text."""
    ids = {text: number for number, text in enumerate(vocabulary.tokens)}
    for text in _PROBES:
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        if pieces(text, vocabulary, ids) != wanted:
            raise ReleaseError(
                "tokenizer-differs",
                f"llama.cpp would cut {text!r} into other tokens than the base's tokenizer",
                hint="use transformers: fedtune release RUN --to merged",
            )


def pieces(text: str, vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[int]:
    """Return llama.cpp's tokens of a text without special tokens.

    Among neighbours whose concatenation is a token, the one with the highest score is merged, the leftmost of equals;
    what is no token in the end is written in bytes.
    """
    prefixed = " " + text if vocabulary.space_prefix and text else text
    symbols = _merged(list(prefixed.replace(" ", _SPACE)), vocabulary.scores or (), ids)
    return [number for symbol in symbols for number in _numbers(symbol, ids)]


def _merged(symbols: list[str], scores: tuple[float, ...], ids: Mapping[str, int]) -> list[str]:
    after = [*range(1, len(symbols)), -1]
    before = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (number := ids.get(symbols[left] + symbols[right])) is not None:
            heapq.heappush(queue, (-scores[number], left, right, symbols[left] + symbols[right]))

    for left in range(len(symbols) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, text = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != text:
            continue
        symbols[left], symbols[right] = text, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [symbol for symbol in symbols if symbol]


def _numbers(symbol: str, ids: Mapping[str, int]) -> list[int]:
    whole = ids.get(symbol)
    return [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()] if whole is None else [whole]


def _space_prefix(definition: dict[str, Any]) -> bool:
    """Return whether a space is put before a text; refuses other text rules."""
    steps, splitter = _steps(definition.get("normalizer")), definition.get("pre_tokenizer") or {}
    kind = splitter.get("type")
    if steps in ([_PREPEND, _REPLACE], [_REPLACE]) and kind in {None, "Split"}:
        return steps[0] == _PREPEND
    if not steps and kind == "Metaspace" and not splitter.get("split", True) and splitter["replacement"] == _SPACE:
        return bool(splitter["prepend_scheme"] != "never")
    raise unknown_tokenizer(f"changes texts by {[step['type'] for step in steps] or kind}")


def prefix_notes(definition: dict[str, Any]) -> tuple[str, ...]:
    """Say where llama.cpp's space before a text is another than the tokenizer's: after special tokens."""
    if (definition.get("pre_tokenizer") or {}).get("prepend_scheme") != "first":
        return ()
    return ("llama.cpp puts a space before text that follows a special token; in training only the first text had one",)


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]
