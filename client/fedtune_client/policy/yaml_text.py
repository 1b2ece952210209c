"""YAML as words and places: what a policy file says before anything has a type.

Only mappings, lists and words: every scalar stays the text it is written as, so `off` is not False, `22:00` is not 1320
and `1e-6` is a number once the schema wants one. Tags, anchors, aliases, a key given twice, a second document and deep
nesting are refused as the parser meets them, so nothing is built, expanded or executed. Knows no key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from fedtune.errors import PolicyError

Path = tuple[str | int, ...]
_DEEPEST = 10
_LONGEST = 65_536
_SHAPE = "write KEY: VALUE on each line"


@dataclass(frozen=True, slots=True)
class Document:
    """The words of a file, where each key stands (its line, from 1), and what the file is called in messages."""

    tree: dict[str, Any]
    lines: dict[Path, int]
    source: str

    def place(self, path: Path) -> str:
        """Say where a key stands, or else what holds it."""
        known = next((path[:length] for length in range(len(path), 0, -1) if path[:length] in self.lines), None)
        return self.source if known is None else f"{self.source} line {self.lines[known]}"


def parse(text: str, source: str) -> Document:
    """Return the words of a YAML text whose top is a mapping; an empty text is an empty one.

    Raises PolicyError: `too-large`, `bad-yaml`, `duplicate-key`, `tag`, `alias`.
    """
    if len(text) > _LONGEST:
        raise PolicyError(
            "too-large", f"{source} holds more than {_LONGEST} characters", hint="fedtune client init writes an example"
        )
    try:
        return _Reader(source).document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        hint = "check the line, its indent and quotes"
        raise PolicyError("bad-yaml", f"{source} {_reason(error)}", hint=hint) from error


def _line(event: yaml.Event) -> int:
    return 0 if event.start_mark is None else event.start_mark.line + 1


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


class _Reader:
    """Builds the tree from the parser's events, noting lines."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines: dict[Path, int] = {}

    def document(self, events: Iterator[yaml.Event]) -> Document:
        next(events)  # the stream begins
        tree = self._node(events, next(events), ()) if not self._ended(next(events)) else {}
        if not isinstance(tree, dict):
            raise PolicyError("bad-yaml", f"{self._source} is not a mapping of keys", hint=_SHAPE)
        next(events, None)  # the document ends
        after = next(events, None)
        if after is not None and not self._ended(after):
            raise self._refusal("bad-yaml", after, "a second document begins", "keep one document")
        return Document(tree, self._lines, self._source)

    @staticmethod
    def _ended(event: yaml.Event) -> bool:
        return isinstance(event, yaml.StreamEndEvent)

    def _node(self, events: Iterator[yaml.Event], event: yaml.Event, path: Path) -> Any:
        self._require_plain(event, path)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(events, path)
        return event.value  # type: ignore[attr-defined]  # the only other node is a scalar

    def _mapping(self, events: Iterator[yaml.Event], path: Path) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            self._require_plain(event, path)
            if not isinstance(event, yaml.ScalarEvent):
                raise self._refusal("bad-yaml", event, "a key must be a word", _SHAPE)
            key = event.value
            if key in tree:
                raise self._refusal("duplicate-key", event, f"{key} is given twice", "keep one of them")
            self._lines[*path, key] = _line(event)
            tree[key] = self._node(events, next(events), (*path, key))
        return tree

    def _list(self, events: Iterator[yaml.Event], path: Path) -> list[Any]:
        entries: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            here = (*path, len(entries))
            self._lines[here] = _line(event)
            entries.append(self._node(events, event, here))
        return entries

    def _require_plain(self, event: yaml.Event, path: Path) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self._refusal("alias", event, "anchors and aliases are refused", "write the value out")
        if getattr(event, "tag", None):
            hint = "leave the tag out: nothing in a policy is executed"
            raise self._refusal("tag", event, "a tag is refused", hint)
        if len(path) > _DEEPEST:
            raise self._refusal("bad-yaml", event, "keys are nested too deeply", "no key is nested so deeply")

    def _refusal(self, slug: str, event: yaml.Event, problem: str, hint: str) -> PolicyError:
        return PolicyError(slug, f"{self._source} line {_line(event)}: {problem}", hint=hint)
