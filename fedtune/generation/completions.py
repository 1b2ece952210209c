"""Completions of a file of prompts, by the study's own template. Knows no run folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedtune.generation.answers import complete, prompt_limit
from fedtune.generation.prompts import prompt_of, text_of, unanswered
from fedtune.generation.stops import stops_of

if TYPE_CHECKING:
    from fedtune.data.table import Table
    from fedtune.generation.sampling import Sampling
    from fedtune.model.workspace import Workspace


def completions(workspace: Workspace, table: Table, sampling: Sampling, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield `prompt`, `completion` and `finish` (`stop`, or `length` where the limit of tokens cut it) a row, in order.

    The table needs the columns of `input_columns`. `prompt` is the text as the model sees it, without special tokens.
    """
    tokenizer, task = workspace.tokenizer, workspace.task
    limit = prompt_limit(workspace, sampling)
    prompts = [prompt_of(record, tokenizer, task, limit) for record in unanswered(table, task)]
    answers = complete(workspace, prompts, sampling, stops_of(tokenizer, task), batch_size)
    for prompt, answer in zip(prompts, answers, strict=True):
        yield {"prompt": text_of(prompt, tokenizer), "completion": answer.text.strip(), "finish": answer.finish}
