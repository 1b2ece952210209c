"""What a classifier thinks of texts: a probability for every label. Knows no file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fedtune.data.records import LabelledText
from fedtune.data.templates import render_all
from fedtune.model.workspace import Workspace
from fedtune.training.evaluate import batches


def probabilities(
    workspace: Workspace, texts: Sequence[str], max_tokens: int, batch_size: int
) -> Iterator[tuple[float, ...]]:
    """Yield the probability of each of the task's labels, in their order, for every text in order."""
    examples = render_all([LabelledText(text, 0) for text in texts], workspace.tokenizer, workspace.task, max_tokens)
    found: dict[int, tuple[float, ...]] = {}
    with torch.inference_mode():
        for positions, batch in batches(workspace, examples, batch_size):
            rows = workspace.logits(batch).float().softmax(-1).tolist()
            found |= dict(zip(positions, map(tuple, rows), strict=True))
    yield from (found[row] for row in range(len(texts)))
