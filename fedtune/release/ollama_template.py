"""Prompts of training as Ollama's TEMPLATE (Go's `text/template`), and when a generation has ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.data.records import instruction_prompt
from fedtune.errors import ReleaseError
from fedtune.release.gguf.tokenizer import end_ids, load_tokenizer
from fedtune.release.ollama_chat import ChatFormat, find_format

if TYPE_CHECKING:
    from collections.abc import Callable

_SPLIT_MARK = "\x00"


@dataclass(frozen=True, slots=True)
class Prompting:
    """A Modelfile's TEMPLATE and stop texts; `notes` are limits, for people to read."""

    template: str
    stops: tuple[str, ...]
    notes: tuple[str, ...] = ()


def find_prompting(base_folder: Path, style: str) -> Prompting:
    """Return how a study of some style (`messages`, `instruction`, `prompt`, `text`) prompted its base.

    Errors: `release.untranslatable-chat`; `release.no-prompt` for a style that generates nothing.
    """
    tokenizer = load_tokenizer(base_folder)
    if style not in _STYLES:
        message = f"a {style} study has no prompt that a text could follow"
        raise ReleaseError("no-prompt", message, hint="fedtune release RUN --to peft")
    return _STYLES[style](tokenizer, _ends(base_folder, tokenizer))


def _messages(tokenizer: Any, ends: tuple[str, ...]) -> Prompting:
    found = find_format(tokenizer)
    marks = tuple(token for token in tokenizer.get_added_vocab() if token in found.assistant[1])
    fallback = (found.assistant[1],) if found.assistant[1].strip() and not (marks or ends) else ()
    notes = ["the template has no place for a system message, as in training; Ollama leaves one out"]
    notes = notes if found.system_place == "none" else []
    if "strftime_now" in (getattr(tokenizer, "chat_template", None) or ""):
        notes.append("the chat template writes the date of the day; TEMPLATE holds the day of this release")
    bare = found.without_bos(tokenizer.bos_token) if _adds_bos(tokenizer) else found
    return Prompting(chat_template(bare), tuple(dict.fromkeys([*marks, *ends, *fallback])), tuple(notes))


def _instruction(_tokenizer: Any, ends: tuple[str, ...]) -> Prompting:
    before, after = instruction_prompt(_SPLIT_MARK).split(_SPLIT_MARK)
    note = "a record's input is asked for as part of the message: INSTRUCTION, a blank line, Input:, and the input"
    return Prompting(go_text(before) + "{{ .Prompt }}" + go_text(after), ends, (note,))


def _prompt(_tokenizer: Any, ends: tuple[str, ...]) -> Prompting:
    return Prompting("{{ .Prompt }}" + go_text("\n"), ends)


def _text(_tokenizer: Any, ends: tuple[str, ...]) -> Prompting:
    return Prompting("{{ .Prompt }}", ends)


_STYLES: dict[str, Callable[[Any, tuple[str, ...]], Prompting]] = {
    "messages": _messages,
    "instruction": _instruction,
    "prompt": _prompt,
    "text": _text,
}


def chat_template(chat: ChatFormat) -> str:
    """Return the Go template of a format, over Ollama's `.Messages` and `.System`.

    Ollama joins neighbours of one role and gives the system messages' joined text as `.System`.
    """
    head = go_text(chat.opening)
    user = go_text(chat.user)
    branches = ""
    match chat.system_place:
        case "turn" | "first":
            head = "{{ if not $.System }}" + head + "{{ end }}" if head else ""
            branches = _branch("system", _around("{{ $m.Content }}", chat.system))
            if chat.system_place == "first":
                user = "{{ if not (and $.System (eq $i 1)) }}" + user + "{{ end }}"
        case "last":
            within = _around("{{ $.System }}", chat.system)
            user += "{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}" + within + "{{ end }}"
        case "none":
            pass
    branches += _branch("user", user + "{{ $m.Content }}")
    branches += _branch("assistant", _around("{{ $m.Content }}", chat.assistant))
    body = branches.replace("{{ else if", "{{ if", 1) + "{{ end }}"
    return head + "{{ range $i, $m := .Messages }}" + body + "{{ end }}" + go_text(chat.prompt)


def go_text(text: str) -> str:
    """Return text for a Go template within a Modelfile: plain where both leave it alone, else a quoted string."""
    if "{{" not in text and '"' not in text and all(_plain(character) for character in text):
        return text
    return '{{ "' + "".join(_escaped(character) for character in text) + '" }}'


def _plain(character: str) -> bool:
    return character == "\n" or (character.isprintable() and character not in "\t\r")


def _escaped(character: str) -> str:
    known = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    if character in known:
        return known[character]
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def _branch(role: str, body: str) -> str:
    return '{{ else if eq $m.Role "' + role + '" }}' + body


def _around(content: str, texts: tuple[str, str]) -> str:
    return go_text(texts[0]) + content + go_text(texts[1])


def _adds_bos(tokenizer: Any) -> bool:
    from fedtune.data.templates import special_tokens

    return bool(special_tokens(tokenizer).before)


def _ends(folder: Path, tokenizer: Any) -> tuple[str, ...]:
    """Return the texts of the tokens that end a generation."""
    return tuple(str(tokenizer.convert_ids_to_tokens(number)) for number in end_ids(folder, tokenizer))
