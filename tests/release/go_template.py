"""The part of Go's text/template that our Modelfiles use, and Ollama's way of calling it.

A reference for tests: `test_ollama_go` compares it with Go itself.
"""

from __future__ import annotations

import json
import re
from typing import Any

Message = dict[str, str]
_PART = re.compile(r'\{\{ ((?:"(?:[^"\\]|\\.)*"|[^"])*?) \}\}', re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+')


def ollama_prompt(template: str, messages: list[Message]) -> str:
    """Render as Ollama does: neighbours of one role joined, system messages also in `.System`."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append(dict(message))
    if ".Messages" in template:
        return render(template, {"Messages": joined, "System": system, "Prompt": ""})
    prompts = [message["content"] for message in joined if message["role"] == "user"]
    return render(template, {"Prompt": prompts[-1], "System": system})


def render(template: str, values: dict[str, Any]) -> str:
    """Render a template with `.NAME` and `$.NAME` from `values`."""
    pieces = _PART.split(template)  # text, action, text, …
    text, at = _list(pieces, 0, {"$": values})
    assert at == len(pieces)
    return text


def _list(pieces: list[str], at: int, scope: dict[str, Any]) -> tuple[str, int]:
    """Render up to the `else` or `end` that closes this list; return the index of that action."""
    text = pieces[at]
    at += 1
    while at < len(pieces):
        action = pieces[at]
        if action.split()[0] in {"else", "end"}:
            return text, at
        if action.startswith("if "):
            shown, at = _branches(pieces, at, action[3:], scope)
        elif action.startswith("range $i, $m := "):
            shown, at = _range(pieces, at, scope)
        else:
            shown = str(_value(action, scope))
        text += shown + pieces[at + 1]
        at += 2
    return text, at


def _branches(pieces: list[str], at: int, condition: str, scope: dict[str, Any]) -> tuple[str, int]:
    chosen, taken = "", False
    while True:
        body, close = _list(pieces, at + 1, scope)
        if not taken and (condition == "" or _value(condition, scope)):
            chosen, taken = body, True
        if pieces[close] == "end":
            return chosen, close
        condition, at = pieces[close].removeprefix("else").strip().removeprefix("if").strip(), close


def _range(pieces: list[str], at: int, scope: dict[str, Any]) -> tuple[str, int]:
    items, text = _value(pieces[at].removeprefix("range $i, $m := "), scope), ""
    for index, item in enumerate(items):
        shown, close = _list(pieces, at + 1, scope | {"i": index, "m": item})
        text += shown
    return text, close


def _value(expression: str, scope: dict[str, Any]) -> Any:
    words = _WORD.findall(expression)
    found, rest = _call(words, scope)
    assert not rest
    return found


def _call(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    head, rest = words[0], words[1:]
    if head not in {"eq", "not", "and", "len", "slice"}:
        return _operand(words, scope)
    given = []
    while rest and rest[0] != ")":
        operand, rest = _operand(rest, scope)
        given.append(operand)
    return _apply(head, given), rest


def _operand(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    head, rest = words[0], words[1:]
    if head == "(":
        found, rest = _call(rest, scope)
        return found, rest[1:]
    if head.startswith('"'):
        return json.loads(re.sub(r"\\U(\w{8})", lambda code: json.dumps(chr(int(code[1], 16)))[1:-1], head)), rest
    if head.isdigit():
        return int(head), rest
    if head.startswith("$m."):
        return scope["m"][head[3:].lower()], rest
    if head == "$i":
        return scope["i"], rest
    return scope["$"][head.removeprefix("$").removeprefix(".")], rest


def _apply(name: str, given: list[Any]) -> Any:
    match name:
        case "eq":
            return given[0] == given[1]
        case "not":
            return not given[0]
        case "and":
            return given[0] and given[1]
        case "len":
            return len(given[0])
        case _:
            return given[0][given[1] :]
