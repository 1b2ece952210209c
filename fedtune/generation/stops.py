"""Where an answer ends: the tokens and texts that training put behind every answer. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.data.chat import lay_out
from fedtune.data.records import Dialogue, Turn
from fedtune.generation.prompts import ANSWER

if TYPE_CHECKING:
    from fedtune.data.tasks import Task


@dataclass(frozen=True, slots=True)
class Stops:
    """An answer ends before any of these tokens, and before any of these texts."""

    tokens: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()


def stops_of(tokenizer: Any, task: Task) -> Stops:
    """Return what ends an answer in a study.

    The end-of-sequence token always does, and so does a second beginning. In a study of messages so does what the
    chat template writes behind the assistant's words: its first special token (`<|im_end|>`), or its text.
    """
    ends = {token for token in (tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None}
    closing = _closing(tokenizer) if task.style == "messages" else ""
    marker = _first_special(closing, tokenizer)
    if marker is not None:
        return Stops(frozenset(ends | {marker}))
    return Stops(frozenset(ends), (closing.strip() or closing,) if closing else ())


def _closing(tokenizer: Any) -> str:
    """Return what training's layout puts behind an assistant's turn."""
    parts = lay_out(Dialogue((Turn("user", "Asked"), Turn("assistant", ANSWER))), tokenizer)
    return parts[-1].text.rpartition(ANSWER)[2]


def _first_special(text: str, tokenizer: Any) -> int | None:
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return next((int(token) for token in tokens if token in special), None)
