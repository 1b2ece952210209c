"""A finished run or a release, opened for use: its plan, its workspace with the adapter, and examples of any file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.data.formats import read_table
from fedtune.data.records import LabelledText
from fedtune.data.table import Table
from fedtune.data.templates import render_all
from fedtune.generation.completions import completions
from fedtune.generation.sampling import Sampling
from fedtune.model.layout import AdapterState
from fedtune.model.workspace import Workspace
from fedtune.release.adapter import load_adapter, rank_of
from fedtune.release.opened import is_release, open_release
from fedtune.release.study import require_common
from fedtune.run.folder import RunFolder
from fedtune.simulation.sites import file_examples
from fedtune.simulation.workspace import open_released
from fedtune.training.evaluate import batches, evaluate

_NEW_TOKENS = 64


class FinishedRun:
    """A released adapter in its model.

    `path` is a run folder, or a release made with `--to peft`, whose base model is `base` or is found by its name and
    content. Errors: `run.no-run`, `run.no-adapter`, `release.personal`, `release.does-not-hold`, `release.no-base`.
    """

    plan: StudyPlan
    workspace: Workspace
    statement: str

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self._adapter, machine = self._release(path, base) if is_release(path) else self._run(path, base)
        self.workspace = open_released(self.plan, machine, rank_of(self._adapter))
        self.workspace.load(self._adapter)

    def _run(self, path: Path, base: Path | None) -> tuple[AdapterState, Machine]:
        folder = RunFolder(path)
        self.plan, summary = folder.plan(), folder.summary()
        self.statement = str(summary["privacy"]["statement"]) if summary else self.plan.promise.statement
        if summary is not None:
            require_common(self.plan)
        adapter = load_adapter(folder.adapter)  # a run that has not ended says so before its model is looked for
        moved = {} if base is None else {"model_folder": str(base)}
        return adapter, folder.machine().model_copy(update=moved)

    def _release(self, path: Path, base: Path | None) -> tuple[AdapterState, Machine]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        used = open_release(path, base, {"device": device, "threads": torch.get_num_threads()})
        self.plan, self.statement = used.plan, used.statement
        return load_adapter(path), used.machine

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
            sampling = Sampling(max_new_tokens=_NEW_TOKENS)
            yield from completions(self.workspace, table, sampling, self.plan.evaluation.batch_size)

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
