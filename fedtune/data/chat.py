"""Dialogues as text: the tokenizer's chat template, or one of our own, with exact bounds of the assistant's turns.

Knows no token numbers. A chat template is Jinja that came with the model folder; `transformers` runs it in a sandbox.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedtune.data.records import Dialogue, Segment, Turn
from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


def lay_out(dialogue: Dialogue, tokenizer: Any) -> tuple[Segment, ...]:
    """Return the dialogue as text segments, trained where the assistant speaks, up to its last turn.

    With a chat template: a trained segment starts where the template's generation prompt ends and closes with what
    the template writes after the content (the end-of-turn marker, so that generation learns to stop). The concatenated
    segments are the template's own text of the whole dialogue. Turns after the assistant's last train nothing and
    are dropped.

    Without one, each turn is a line `System:`, `User:` or `Assistant:`, the content, and a blank line; the assistant's
    content is trained, and the end-of-sequence token stands in place of its blank line where the tokenizer has one.

    Raises `data.chat-template` when the template refuses the dialogue, or lays out an earlier turn differently
    once a later one follows in a way that leaves the assistant's text without exact bounds.
    """
    last = max(at for at, turn in enumerate(dialogue.turns) if turn.role == "assistant")
    turns = dialogue.turns[: last + 1]
    if not getattr(tokenizer, "chat_template", None):
        return _plain(turns, getattr(tokenizer, "eos_token", None))
    return _templated(turns, tokenizer)


def _plain(turns: Sequence[Turn], end: str | None) -> tuple[Segment, ...]:
    pieces = []
    for turn in turns:
        trained = turn.role == "assistant"
        stop = end if end and trained else "\n\n"
        pieces += [Segment(f"{_NAMES[turn.role]}:\n", trained=False), Segment(turn.content + stop, trained=trained)]
    return _joined(pieces)


def _templated(turns: Sequence[Turn], tokenizer: Any) -> tuple[Segment, ...]:
    """Cut the text of the whole dialogue at the start and the end of each assistant turn."""
    whole = _rendered(turns, tokenizer)
    pieces, at = [], 0
    for count, turn in enumerate(turns):
        if turn.role == "assistant":
            start = _start(whole, turns[:count], tokenizer)
            end = _end(whole, start, turns[: count + 1], tokenizer)
            pieces += [Segment(whole[at:start], trained=False), Segment(whole[start:end], trained=True)]
            at = end
    return _joined(pieces)


def _start(whole: str, before: Sequence[Turn], tokenizer: Any) -> int:
    """Return where generation would start after the turns before."""
    prompt = _rendered(before, tokenizer, prompt=True) if before else ""
    if not whole.startswith(prompt):
        raise _inexact(len(before))
    return len(prompt)


def _end(whole: str, start: int, turns: Sequence[Turn], tokenizer: Any) -> int:
    """Return where the last of these turns ends in the whole text.

    Some templates write a turn differently when it is the last one (they drop or add an empty reasoning block), so the
    dialogue up to here need not be a prefix of the whole; what follows the content is the same in both.
    """
    upto = _rendered(turns, tokenizer)
    if whole.startswith(upto):
        return len(upto)
    content = turns[-1].content.strip()
    closing = upto[upto.rindex(content) + len(content) :] if content in upto else None
    at = whole.find(content, start) + len(content)
    if closing is None or at < start + len(content) or not whole.startswith(closing, at):
        raise _inexact(len(turns) - 1)
    return at + len(closing)


def _rendered(turns: Sequence[Turn], tokenizer: Any, *, prompt: bool = False) -> str:
    import jinja2

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except jinja2.TemplateError as error:
        raise DataError(
            "chat-template",
            f"the tokenizer's chat template refuses a dialogue: {error}",
            hint="many templates want user and assistant in turn, and some allow no system message",
        ) from error
    return str(text)


def _inexact(turn: int) -> DataError:
    return DataError(
        "chat-template",
        f"the tokenizer's chat template gives turn {turn + 1} of a dialogue no exact place in the whole",
        hint="use a base model with another chat template, or data.prompt and data.completion",
    )


def _joined(pieces: Sequence[Segment]) -> tuple[Segment, ...]:
    """Join neighbours that are both trained or both not, and drop empty ones."""
    joined: list[Segment] = []
    for piece in pieces:
        if piece.text and joined and joined[-1].trained is piece.trained:
            joined[-1] = Segment(joined[-1].text + piece.text, piece.trained)
        elif piece.text:
            joined.append(piece)
    return tuple(joined)
