"""A chat with a study's model: what was said, and how the study's task puts the next words. Knows no terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.data.records import Dialogue, Record, Turn
from fedtune.data.table import Table
from fedtune.errors import ConfigError
from fedtune.generation.answers import Answer, prompt_limit
from fedtune.generation.prompts import ANSWER, Prompt, prompt_of, unanswered
from fedtune.generation.sampling import Sampling
from fedtune.generation.stops import stops_of

if TYPE_CHECKING:
    from fedtune.model.workspace import Workspace

_MANNERS = {
    "messages": "a conversation; /reset forgets it",
    "prompt": "the study learnt prompt and completion, so each line is a prompt of its own",
    "instruction": "the study learnt instruction and output, so each line is an instruction of its own",
    "text": "the study learnt whole texts, so each line is a text to be continued",
}


class Chat:
    """A model of a study of language, and the conversation so far.

    Only a study of `messages` has learnt conversations of several turns and a system message; in any other each words
    are put as one record of the study. `given` is what an instruction applies to, where the study has such a column.
    Errors: `config.no-system-message`, `config.no-input`.
    """

    def __init__(self, workspace: Workspace, sampling: Sampling, system: str | None = None) -> None:
        self._workspace, self._sampling, self._task = workspace, sampling, workspace.task
        if system is not None and self._task.style != "messages":
            message = f"the study learnt no messages but {self._task.style}, so nothing takes a system message"
            raise ConfigError("no-system-message", message, hint="leave --system out")
        self._system = [Turn("system", system)] if system else []
        self._stops = stops_of(workspace.tokenizer, self._task)
        self._turns: list[Turn] = []
        self._asked = 0
        self.given = ""

    @property
    def manner(self) -> str:
        """How words are put to the model, for the person who writes them."""
        return _MANNERS[self._task.style]

    def reset(self) -> None:
        """Forget the conversation and what instructions apply to; the same words are answered as at the start."""
        self._turns, self._asked, self.given = [], 0, ""

    def apply_to(self, given: str) -> None:
        """Set what the following instructions apply to."""
        if "input" not in self._task.columns:
            raise ConfigError(
                "no-input", "the study has no column of inputs", hint="write it into the words themselves"
            )
        self.given = given

    def ask(self, text: str) -> Answer:
        """Put words to the model; the answer is written while it is iterated."""
        number, self._asked = self._asked, self._asked + 1
        return Answer(self._workspace, self.prompt(text), self._sampling, self._stops, number)

    def prompt(self, text: str) -> Prompt:
        """Return the tokens that put these words now."""
        limit = prompt_limit(self._workspace, self._sampling)
        return prompt_of(self._record(text), self._workspace.tokenizer, self._task, limit)

    def remember(self, text: str, answer: str) -> None:
        """Add an exchange to the conversation, unless nothing was answered or the study knows no conversation."""
        if self._task.style == "messages" and answer.strip():
            self._turns += [Turn("user", text), Turn("assistant", answer)]

    def _record(self, text: str) -> Record:
        if self._task.style == "messages":
            return Dialogue((*self._system, *self._turns, Turn("user", text), Turn("assistant", ANSWER)))
        said = {"text": text, "prompt": text, "instruction": text, "input": self.given}
        columns: dict[str, tuple[object, ...]] = {
            self._task.columns[role]: (words,) for role, words in said.items() if role in self._task.columns
        }
        (record,) = unanswered(Table(columns, 1, "the words", "chat"), self._task)
        return record
