"""How a study laid out dialogues, found by looking: the texts around each role's messages.

A chat template is a program in Jinja; Ollama's are Go templates. Instead of translating programs, the layout of
training is rendered on dialogues with known contents, the texts between them are read off, and the result is checked
against the layout on more dialogues, character by character. What is not a sequence of turns with fixed texts around
them is refused.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fedtune.data.chat import lay_out
from fedtune.data.records import Dialogue, Segment, Turn
from fedtune.errors import ReleaseError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SystemPlace = Literal["turn", "first", "last", "none"]
_A, _B, _C, _S = "firstquestion", "firstanswer", "secondquestion", "systemmessage"
_CONTENTS = (
    "How do I renew my card?",
    'Two lines:\n\n- "quoted" {{braces}} \\ backslash <tag>',
    "Überweisung 日本語 🦙 100 % `code`",
)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Texts around messages, up to where the assistant begins to generate.

    `opening` stands before the first turn when no system message does; `user` before a user's content, `assistant`
    before and after an assistant's, `prompt` where the assistant is to answer. A system message stands between
    `system`: as a turn of its own that opens the dialogue, or within the first or the last user turn, or nowhere
    (`none`: the layout of training has no place for it). What follows a user's content is part of `assistant` and
    `prompt`.
    """

    opening: str
    user: str
    assistant: tuple[str, str]
    prompt: str
    system: tuple[str, str] = ("", "")
    system_place: SystemPlace = "none"

    def render(self, turns: Sequence[Turn]) -> str:
        """Return the prompt after some turns; the last one is the user's."""
        system = turns[0].content if turns[0].role == "system" else None
        spoken = turns if system is None else turns[1:]
        text = self._head(system)
        for at, turn in enumerate(spoken):
            text += self._turn(turn, system, first=at == 0, last=at == len(spoken) - 1)
        return text + self.prompt

    def _head(self, system: str | None) -> str:
        if system is None or self.system_place in {"last", "none"}:
            return self.opening
        return system.join(self.system)

    def _turn(self, turn: Turn, system: str | None, *, first: bool, last: bool) -> str:
        if turn.role == "assistant":
            return turn.content.join(self.assistant)
        if system is not None and self.system_place == "first" and first:
            return turn.content
        within = system.join(self.system) if system is not None and self.system_place == "last" and last else ""
        return self.user + within + turn.content

    def without_bos(self, bos: str) -> ChatFormat:
        """Return the format for a tokenizer that puts its own bos before every text."""
        opens_with_system = self.system_place in {"turn", "first"}
        system = (self.system[0].removeprefix(bos), self.system[1]) if opens_with_system else self.system
        if self.opening:
            return replace(self, opening=self.opening.removeprefix(bos), system=system)
        return replace(self, system=system)


def find_format(tokenizer: Any) -> ChatFormat:
    """Read off and check the layout of training; error: `release.untranslatable-chat` when it is no fixed format."""
    plain = _read_off(tokenizer)
    for candidate in itertools.chain(_with_system(plain, tokenizer), [plain]):
        with_system = candidate.system_place != "none"
        if all(candidate.render(turns) == _prompt(turns, tokenizer) for turns in _dialogues(with_system)):
            return candidate
    raise _untranslatable("lays out turns by more than their role and place")


def _read_off(tokenizer: Any) -> ChatFormat:
    question, answer, second = Turn("user", _A), Turn("assistant", _B), Turn("user", _C)
    before, prompt = _cut(_prompt([question], tokenizer), _A)
    _, answering, between, _ = _cut(_prompt([question, answer, second], tokenizer), _A, _B, _C)
    ended = _cut(_answered([question], tokenizer)[-1].text, _B)[1]
    closing = _common(between, ended)
    user = between.removeprefix(closing)
    if not before.endswith(user):
        raise _untranslatable("lays out the first question otherwise than the second")
    return ChatFormat(before.removesuffix(user), user, (answering, closing), prompt)


def _with_system(plain: ChatFormat, tokenizer: Any) -> Iterator[ChatFormat]:
    """Yield the places where a system message may stand; the layout of training may refuse one."""
    try:
        text = _prompt([Turn("system", _S), Turn("user", _A)], tokenizer)
    except ReleaseError:
        return
    if text.count(_S) != 1 or text.count(_A) != 1 or text.index(_S) > text.index(_A):
        return
    before, between, _ = _cut(text, _S, _A)
    if between.endswith(plain.user):
        yield replace(plain, system=(before, between.removesuffix(plain.user)), system_place="turn")
    yield replace(plain, system=(before, between), system_place="first")
    if before.startswith(plain.opening + plain.user):
        yield replace(plain, system=(before.removeprefix(plain.opening + plain.user), between), system_place="last")


def _dialogues(with_system: bool) -> Iterator[list[Turn]]:
    """Yield dialogues of one to three questions, with and without a system message."""
    for contents in itertools.permutations(_CONTENTS):
        for questions in (1, 2, 3):
            roles = ["user", "assistant"] * questions
            turns = [Turn(role, text) for role, text in zip(roles[:-1], itertools.cycle(contents), strict=False)]
            yield turns
            if with_system:
                yield [Turn("system", contents[1]), *turns]


def _prompt(turns: Sequence[Turn], tokenizer: Any) -> str:
    """Return what stands before the assistant's answer to these turns."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        return "".join(segment.text for segment in _answered(turns, tokenizer)[:-1])
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        raise _untranslatable(f"refuses a dialogue ({error})") from error


def _answered(turns: Sequence[Turn], tokenizer: Any) -> tuple[Segment, ...]:
    """Lay out these turns with an answer, as training does; the last segment is the answer with its end."""
    return lay_out(Dialogue((*turns, Turn("assistant", _B))), tokenizer)


def _common(left: str, right: str) -> str:
    """Return what two texts begin with alike."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return "".join(character for character, _ in alike)


def _cut(text: str, *contents: str) -> list[str]:
    """Return the texts around contents that must each stand once, in order."""
    parts = []
    for content in contents:
        head, found, text = text.partition(content)
        if not found or content in text:
            raise _untranslatable("leaves out a message or repeats one")
        parts.append(head)
    return [*parts, text]


def _untranslatable(finding: str) -> ReleaseError:
    return ReleaseError(
        "untranslatable-chat",
        f"the base's chat template {finding}, which no Modelfile was made for",
        hint="fedtune release RUN --to gguf carries the template itself: llama-server --jinja runs it",
    )
