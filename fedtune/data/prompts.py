"""Prompts for a trained causal model: a record's text up to where its completion would begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedtune.data.cells import texts
from fedtune.data.records import Dialogue, instruction_prompt, to_records
from fedtune.data.templates import segments_of

if TYPE_CHECKING:
    from fedtune.data.table import Table
    from fedtune.data.tasks import Task


def prompts_of(table: Table, task: Task, tokenizer: Any) -> list[str]:
    """Return one prompt a row, laid out as in training; completion columns are not needed.

    A dialogue's prompt is everything before the assistant's last turn; a `text` task continues the text itself.
    """
    if task.style == "messages":
        dialogues = [record for record in to_records(table, task) if isinstance(record, Dialogue)]
        return ["".join(part.text for part in segments_of(dialogue, tokenizer)[:-1]) for dialogue in dialogues]
    if task.style == "instruction":
        given = texts(table, task.columns["input"], optional=True) if "input" in task.columns else [""] * table.rows
        return list(map(instruction_prompt, texts(table, task.columns["instruction"]), given))
    role = "prompt" if task.style == "prompt" else "text"
    prompts = texts(table, task.columns[role])
    return list(prompts) if role == "text" else [text if text[-1].isspace() else f"{text}\n" for text in prompts]
