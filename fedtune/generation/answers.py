"""Answers of an adapted model: one that streams, or many at once. Knows no terminal and no file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedtune.generation.decoding import Decoder, can_mix_lengths, window_of
from fedtune.generation.prompts import Prompt
from fedtune.generation.sampling import Sampling, next_token
from fedtune.generation.stops import Stops
from fedtune.generation.streaming import TextStream
from fedtune.model.workspace import Workspace

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; `finish` says whether the model ended it or the limit of tokens did."""

    text: str
    tokens: int
    finish: Finish


class Answer:
    """One answer, as pieces of text while it is written; `completion` is what was written so far.

    `number` tells answers of one seed apart; `cut` says that the beginning of the prompt was left out.
    """

    def __init__(self, workspace: Workspace, prompt: Prompt, sampling: Sampling, stops: Stops, number: int = 0) -> None:
        self._row = _Row(workspace, prompt, sampling, stops, number)
        self.cut = prompt.cut
        self._decoder = Decoder(workspace, [prompt.tokens])

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text, some of them empty, until the answer ends."""
        while not self._row.done:
            yield self._row.take(self._decoder.logits()[0])
            self._decoder.append([self._row.last])

    @property
    def completion(self) -> Completion:
        """What was written, also after an interruption."""
        return self._row.completion


def complete(
    workspace: Workspace, prompts: Sequence[Prompt], sampling: Sampling, stops: Stops, batch_size: int
) -> Iterator[Completion]:
    """Yield the answer to every prompt, in order; `batch_size` of them are written at once.

    What is drawn for a prompt depends on the seed and its number, not on the batch.
    """
    size = batch_size if can_mix_lengths(workspace) else 1
    for start in range(0, len(prompts), size):
        chosen = prompts[start : start + size]
        rows = [_Row(workspace, prompt, sampling, stops, start + at) for at, prompt in enumerate(chosen)]
        decoder = Decoder(workspace, [prompt.tokens for prompt in chosen])
        while not all(row.done for row in rows):
            for row, logits in zip(rows, decoder.logits(), strict=True):
                row.take(logits)
            decoder.append([row.last for row in rows])
        yield from (row.completion for row in rows)


def prompt_limit(workspace: Workspace, sampling: Sampling) -> int:
    """Return how many tokens a prompt may have so that the answer fits behind it, or half of what the base can see."""
    window = window_of(workspace)
    return sys.maxsize if window is None else max(window - sampling.max_new_tokens, window // 2)


class _Row:
    """One answer in the making."""

    def __init__(self, workspace: Workspace, prompt: Prompt, sampling: Sampling, stops: Stops, number: int = 0) -> None:
        window = window_of(workspace)
        self._limit = min(sampling.max_new_tokens, (window or sys.maxsize) - len(prompt.tokens))
        self._sampling, self._stops = sampling, stops
        self._generator = sampling.generator(number)
        self._stream = TextStream(workspace.tokenizer, stops.texts)
        self._finish: Finish | None = None
        self._written = 0
        self.last = workspace.pad_id

    @property
    def done(self) -> bool:
        return self._finish is not None

    @property
    def completion(self) -> Completion:
        return Completion(self._stream.given, self._written, self._finish or "length")

    def take(self, logits: Tensor) -> str:
        """Choose the next token, and return the text that is certain now; a finished answer takes no more."""
        if self.done:
            return ""
        self.last = next_token(logits, self._sampling, self._generator)
        if self.last in self._stops.tokens:
            self._finish = "stop"
            return self._stream.finish()
        piece = self._stream.push(self.last)
        self._written += 1
        if self._stream.stopped:
            self._finish = "stop"
        elif self._written >= self._limit:
            self._finish = "length"
            piece += self._stream.finish()
        return piece
