"""From a policy file to a `Policy`, with every mistake in it named at once: key, place, what was found, what was meant.

Knows YAML's words and the schema's keys; decides nothing about a plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtune.errors import PolicyError
from fedtune_client.policy.schema import MARKS, PATTERNS, Policy
from fedtune_client.policy.yaml_text import Document, parse

NAME = "NAME"  # stands for a data set's own name in the name of a key
_LONGEST = 4 * 65_536  # bytes: that many characters at most
_KINDS = {"extra_forbidden": "unknown-key", "missing": "missing-key"}
_REASONS = {
    "model_type": "it should be a mapping of keys",
    "tuple_type": "it should be a list [a, b]",
    "string_type": "it should be text",
    "too_short": "it should hold at least one entry",
    "union_tag_invalid": "it should have one of the forms that the example shows",
}


def read_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises PolicyError: `missing-file`, `unreadable` (not permitted, not a file, not UTF-8), `too-large`, `bad-yaml`,
    `duplicate-key`, `tag`, `alias`, and for its content `unknown-key`, `missing-key`, `bad-value`.
    """
    return parse_policy(_read(path), str(path))


def parse_policy(text: str, source: str = "policy.yaml") -> Policy:
    """Return the policy that a YAML text spells; `source` is what messages call it."""
    document = parse(text, source)
    try:
        return Policy.model_validate(document.tree)
    except ValidationError as error:
        raise _refusal(error, document) from None


@cache
def policy_keys() -> tuple[str, ...]:
    """Every key by its dotted name, in the schema's order; `NAME` stands for a data set's name."""
    schema = Policy.model_json_schema()
    return tuple(dict.fromkeys(_keys(schema, schema["$defs"], "")))


def _keys(schema: Any, definitions: Any, prefix: str) -> Iterator[str]:
    for form in [schema, *schema.get("anyOf", []), *schema.get("oneOf", [])]:
        entry = definitions.get(form.get("$ref", "").rsplit("/", 1)[-1], form)
        for name, value in entry.get("properties", {}).items():
            yield prefix + name
            yield from _keys(value, definitions, f"{prefix}{name}.")
        # A list's entries have its name; a mapping's have names that the site gives.
        if isinstance(entry.get("items"), dict):
            yield from _keys(entry["items"], definitions, prefix)
        for value in entry.get("patternProperties", {}).values():
            yield from _keys(value, definitions, f"{prefix}{NAME}.")


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise PolicyError("unreadable", f"{path} is not a file", hint="name the policy's YAML file")
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
        return content.decode("utf-8-sig", "strict" if len(content) <= _LONGEST else "ignore")
    except FileNotFoundError:
        hint = "fedtune client init writes a strict one to edit"
        raise PolicyError("missing-file", f"there is no policy {path}", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        raise PolicyError("unreadable", f"{path} {reason}", hint="a policy is a text file in UTF-8") from None


def _refusal(error: ValidationError, document: Document) -> PolicyError:
    """Name every mistake; the first kind in the order unknown key, missing key, bad value is the code."""
    found = [_mistake(entry, document) for entry in error.errors(include_url=False)]
    slug = next(slug for slug in ("unknown-key", "missing-key", "bad-value") if slug in {kind for kind, _ in found})
    lines = list(dict.fromkeys(line for _, line in found))
    message = lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} mistakes in the policy", *lines])
    return PolicyError(slug, message, hint=f"mend {document.source}, then: fedtune client policy check")


def _mistake(entry: Any, document: Document) -> tuple[str, str]:
    path, value = _followed(entry["loc"], document.tree)
    key, place = ".".join(str(part) for part in path), document.place(path)
    slug = _KINDS.get(entry["type"], "bad-value")
    if slug == "unknown-key":
        return slug, f"{place}: {key} is not a key{_meant(path)}"
    if slug == "missing-key":
        return slug, f"{place}: {key} must be given"
    return slug, f"{place}: {key} is {_shown(value)}: {_reason(entry)}"


def _followed(location: tuple[str | int, ...], tree: Any) -> tuple[tuple[str | int, ...], Any]:
    """Return the part of a pydantic location that are keys of the file, and what stands there."""
    path: tuple[str | int, ...] = ()
    for part in location:
        if part in MARKS and not (isinstance(tree, dict) and part in tree):
            continue
        path = (*path, part)
        if isinstance(tree, dict):
            tree = tree.get(part)
        else:
            tree = tree[part] if isinstance(tree, list) and isinstance(part, int) and part < len(tree) else None
    return path, tree


def _meant(path: tuple[str | int, ...]) -> str:
    """Say which key was probably meant: one beside it, or one of the same or a similar name elsewhere."""
    words = [str(part) for part in path if not isinstance(part, int)]
    if words[0] == "data" and len(words) > 1:
        words[1] = NAME
    parent, last = ".".join([*words[:-1], ""]), words[-1]
    beside = [key.removeprefix(parent) for key in policy_keys() if key.startswith(parent)]
    beside = [key for key in beside if "." not in key]
    if near := get_close_matches(last, beside, n=1, cutoff=0.6):
        return f"; nearest: {parent.replace(NAME, str(path[1])) if len(path) > 1 else parent}{near[0]}"
    same = [key for key in policy_keys() if key.rsplit(".", 1)[-1] == last]
    near = same[:1] or get_close_matches(".".join(words), policy_keys(), n=1, cutoff=0.6)
    return f"; nearest: {near[0]}" if near else f"; allowed: {', '.join(beside)}" if beside else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = "nothing" if value in {None, ""} else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"  # noqa: PLR2004 - a line of a terminal


def _reason(entry: Any) -> str:
    if entry["type"] == "string_pattern_mismatch":
        return f"it should be {PATTERNS[entry['ctx']['pattern']]}"
    message = str(_REASONS.get(entry["type"], entry["msg"])).removeprefix("Value error, ")
    message = message.replace("Input should", "it should")
    return message[:1].lower() + message[1:]
