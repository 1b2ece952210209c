"""Records: what a row means to the task, before any tokenizer. Knows no token and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.data.cells import blank, mixed, texts
from fedtune.data.labels import label_names
from fedtune.errors import DataError

if TYPE_CHECKING:
    from fedtune.data.table import Table
    from fedtune.data.tasks import Task

ROLE_NAMES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text and its class: `label` is the index into the task's labels."""

    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text; `trained` says whether its tokens count in the loss."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """Text for causal language modelling, in segments; the last one is trained."""

    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a dialogue; `role` is one of `ROLE_NAMES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages that the tokenizer's chat template will lay out; at least one turn is the assistant's."""

    turns: tuple[Turn, ...]


Record = LabelledText | Conversation | Dialogue


def to_records(table: Table, task: Task) -> list[Record]:
    """Read each row as a record, in the order of the table.

    | style          | record                                                                       |
    |----------------|------------------------------------------------------------------------------|
    | classification | the text and the index of its label                                          |
    | text           | the text, all of it trained                                                  |
    | prompt         | prompt, a newline unless it ends with a space, then completion (trained)      |
    | instruction    | the layout of `instruction_prompt`, then the output (trained)                |
    | messages       | the turns as they are                                                        |

    Raises, each with the row's place: `data.unknown-label` for a label that is not among the task's (seen at a site or
    in a test file but not in training), `data.blank-value`, `data.mixed-types`, `data.bad-messages`.
    """
    if task.style == "classification":
        return list(_labelled(table, task))
    if task.style == "messages":
        return [_dialogue(table, task.columns["messages"], row) for row in range(table.rows)]
    return list(_conversations(table, task))


def instruction_prompt(instruction: str, given: str = "") -> str:
    """Lay out an instruction, and what it is to be applied to, for a completion to follow."""
    parts = [f"Instruction:\n{instruction}", f"Input:\n{given}" if given else "", "Answer:\n"]
    return "\n\n".join(part for part in parts if part)


def _labelled(table: Table, task: Task) -> list[LabelledText]:
    index = {label: at for at, label in enumerate(task.labels)}
    names = label_names(table, task.columns["label"])
    for row, name in enumerate(names):
        if name not in index:
            raise DataError(
                "unknown-label",
                f"{table.place(row)}: the label '{name}' is not among the {len(index)} labels of the study",
                hint="remove these records, correct the label, or list all labels with data.labels=[…] and train again",
            )
    contents = texts(table, task.columns["text"])
    return [LabelledText(text, index[name]) for text, name in zip(contents, names, strict=True)]


def _conversations(table: Table, task: Task) -> list[Conversation]:
    if task.style == "text":
        return [Conversation((Segment(text, trained=True),)) for text in texts(table, task.columns["text"])]
    if task.style == "prompt":
        prompts, answers = (texts(table, task.columns[role]) for role in ("prompt", "completion"))
        return [_answered(_spaced(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
    instructions, answers = (texts(table, task.columns[role]) for role in ("instruction", "output"))
    given = texts(table, task.columns["input"], optional=True) if "input" in task.columns else [""] * table.rows
    laid_out = map(instruction_prompt, instructions, given)
    return [_answered(prompt, answer) for prompt, answer in zip(laid_out, answers, strict=True)]


def _answered(prompt: str, answer: str) -> Conversation:
    return Conversation((Segment(prompt, trained=False), Segment(answer, trained=True)))


def _spaced(prompt: str) -> str:
    """End the prompt with white space, by itself: so it is the same where its answer is not known yet."""
    return prompt if prompt[-1].isspace() else f"{prompt}\n"


def _dialogue(table: Table, column: str, row: int) -> Dialogue:
    value = table.column(column)[row]
    if value is None:
        raise blank(table, column, row)
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise mixed(table, column, row, "a list of messages")
    turns = tuple(_turn(message, table, row) for message in value)
    if not any(turn.role == "assistant" for turn in turns):
        raise _bad_messages(table, row, "no message of the role 'assistant', so there is nothing to learn")
    return Dialogue(turns)


def _turn(message: object, table: Table, row: int) -> Turn:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if role not in ROLE_NAMES:
        raise _bad_messages(table, row, f"the role {role!r} is not one of {', '.join(ROLE_NAMES)}")
    if not isinstance(content, str) or not content.strip():
        raise _bad_messages(table, row, f"a message of the role '{role}' has no text")
    return Turn(str(role), content)


def _bad_messages(table: Table, row: int, problem: str) -> DataError:
    return DataError(
        "bad-messages",
        f"{table.place(row)}: {problem}",
        hint='write messages as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
    )
