"""Prompts: what stands before an answer, by the very functions that laid out the training examples.

A prompt is a training record whose answer is not known yet: a stand-in takes the answer's place, training's own
function renders the record, and everything from the stand-in on is cut off. So no layout, boundary or
beginning-of-sequence token can differ between training and use. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.data.records import Conversation, Record, Segment, to_records
from fedtune.data.templates import IGNORED, render
from fedtune.errors import DataError

if TYPE_CHECKING:
    from fedtune.data.table import Table
    from fedtune.data.tasks import Task

ANSWER = "Answered"  # the stand-in; it starts with no space, as an answer does
_ANSWER_ROLES = ("completion", "output")


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens that generation starts from; `cut` says whether the beginning of the text was left out."""

    tokens: tuple[int, ...]
    cut: bool = False


def prompt_of(record: Record, tokenizer: Any, task: Task, max_tokens: int) -> Prompt:
    """Return what precedes a record's last trained segment, in at most `max_tokens` tokens.

    These are the tokens that a training example of the same record has before its answer, as long as both fit. Too
    long a prompt loses tokens from its left, as in training. Errors: `data.empty-prompt`, `data.chat-template`.
    """
    example = render(record, tokenizer, task, max_tokens)
    assert example.labels is not None  # noqa: S101 - only classification has none
    given = np.flatnonzero(example.labels == IGNORED)
    if not len(given):
        raise DataError("empty-prompt", "a prompt has no token in this base's vocabulary", hint="write some words")
    return Prompt(tuple(example.input_ids[: given[-1] + 1].tolist()), example.truncated)


def text_of(prompt: Prompt, tokenizer: Any) -> str:
    """Return a prompt as text, special tokens left out."""
    return str(tokenizer.decode(prompt.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def unanswered(table: Table, task: Task) -> list[Record]:
    """Read rows as records that wait for an answer; columns of answers need not be there.

    | style       | what is to be answered                                                              |
    |-------------|-------------------------------------------------------------------------------------|
    | text        | the text, which is continued                                                        |
    | prompt      | the prompt                                                                          |
    | instruction | the instruction and its input                                                       |
    | messages    | the dialogue up to the assistant's last turn where it ends with one, or all of it   |

    Errors: those of `to_records`.
    """
    if task.style == "messages":
        return to_records(_with_answers(table, task.columns["messages"]), task)
    absent = {column: (ANSWER,) * table.rows for role, column in task.columns.items() if role in _ANSWER_ROLES}
    records = to_records(replace(table, columns={**table.columns, **absent}), task)
    return [_continued(record) for record in records] if task.style == "text" else records


def input_columns(task: Task) -> list[str]:
    """Return the columns that a file of prompts must have."""
    return [column for role, column in task.columns.items() if role not in {"label", *_ANSWER_ROLES}]


def _with_answers(table: Table, column: str) -> Table:
    """End every dialogue with a turn of the assistant; what is no list of messages is left for its reader to refuse."""
    return replace(table, columns={**table.columns, column: tuple(map(_answered, table.column(column)))})


def _answered(messages: object) -> object:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        return messages
    last = messages[-1]
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        return messages
    return [*messages, {"role": "assistant", "content": ANSWER}]


def _continued(record: Record) -> Record:
    """Take a text, which is trained as a whole, for the prompt of its continuation."""
    if not isinstance(record, Conversation):
        return record
    text = "".join(segment.text for segment in record.segments)
    return Conversation((Segment(text, trained=False), Segment(ANSWER, trained=True)))
