"""A finished run, opened for use: its plan, its workspace with the released adapter, and examples of any file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedtune.config.plan import StudyPlan
from fedtune.data.formats import read_table
from fedtune.data.prompts import prompts_of
from fedtune.data.records import LabelledText
from fedtune.data.table import Table
from fedtune.data.templates import render_all
from fedtune.model.workspace import Workspace
from fedtune.release.adapter import load_adapter
from fedtune.run.folder import RunFolder
from fedtune.simulation.sites import file_examples
from fedtune.simulation.workspace import open_workspace
from fedtune.training.evaluate import batches, evaluate

_NEW_TOKENS = 64


class FinishedRun:
    """A released adapter in its model."""

    def __init__(self, path: Path) -> None:
        folder = RunFolder(path)
        self.plan: StudyPlan = folder.plan()
        self._summary = folder.summary()
        adapter = load_adapter(folder.adapter)
        self.workspace: Workspace = open_workspace(self.plan, folder.machine())
        self._adapter = {name: adapter[name] for name in self.workspace.layout.names}
        self.workspace.load(self._adapter)

    @property
    def statement(self) -> str:
        """What was promised and kept, as the run's summary states it."""
        return str(self._summary["privacy"]["statement"]) if self._summary else self.plan.promise.statement

    def metrics(self, path: str) -> dict[str, float]:
        """Return the metrics on a file that has the plan's columns."""
        examples = file_examples(self.plan, path, self.workspace.tokenizer)
        return evaluate(self.workspace, self._adapter, examples, self.plan.evaluation.batch_size).metrics()

    def predictions(self, path: str) -> Iterator[dict[str, Any]]:
        """Yield one prediction a record, in the order of the file; the file needs no label or completion column."""
        task = self.plan.task
        given = [column for role, column in task.columns.items() if role not in {"label", "completion", "output"}]
        table = read_table(path, "auto", columns=given)
        if task.kind == "classification":
            yield from self._classes(table)
        else:
            yield from self._continuations(table)

    def _classes(self, table: Table) -> Iterator[dict[str, Any]]:
        task = self.plan.task
        texts = [LabelledText(str(text), 0) for text in table.column(task.columns["text"])]
        examples = render_all(texts, self.workspace.tokenizer, task, self.plan.data.max_tokens)
        found: dict[int, tuple[int, float]] = {}
        with torch.inference_mode():
            for positions, batch in batches(self.workspace, examples, self.plan.evaluation.batch_size):
                best = self.workspace.logits(batch).float().softmax(-1).max(-1)
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                found |= dict(zip(positions, pairs, strict=True))
        for row, text in enumerate(texts):
            index, probability = found[row]
            yield {"text": text.text, "label": task.labels[index], "probability": round(probability, 6)}

    def _continuations(self, table: Table) -> Iterator[dict[str, Any]]:
        tokenizer = self.workspace.tokenizer
        for prompt in prompts_of(table, self.plan.task, tokenizer):
            encoded = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=self.plan.data.max_tokens)
            encoded = {name: encoded[name].to(self.workspace.device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode(), self.workspace.precision():
                output = self.workspace.model.generate(  # type: ignore[operator]
                    **encoded, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=self.workspace.pad_id
                )
            new = output[0, encoded["input_ids"].shape[1] :]
            yield {"prompt": prompt, "completion": tokenizer.decode(new, skip_special_tokens=True).strip()}
