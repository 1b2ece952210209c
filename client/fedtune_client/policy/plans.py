"""A plan that another machine wrote: read as data, bounded before it is parsed, and refused with a code that says why.

The rules, each with its code `policy.plan-…`:

- `too-large`, `too-deep`: more text or nesting than any study needs, found before anything is built from it;
- `not-json`: no JSON object; `number`: NaN, an infinity, or a number that no setting holds;
- `executable`: a key that names something to run (`_target_` and its like): a plan is data;
- `unknown-key`, `missing-key`, `bad-value`: not a study plan of this version;
- `not-canonical`: another spelling of a plan, whose hash would not be that of what was approved;
- `promise`, `task`: the privacy plan or the task contradicts itself;
- `path`: a path, or signs that no name has, where a name belongs.

Knows no policy: a plan that can be read may still be refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, NoReturn

from pydantic import ValidationError

from fedtune.config.plan import StudyPlan
from fedtune.errors import ConfigError, DataError, PolicyError, PrivacyError

_LONGEST = 1_000_000
_DEEPEST = 12
_LARGEST = 2.0**63  # above every bound of a setting; a seed is below it
_LONGEST_NAME = 200
_LONGEST_NUMBER = 40
_HINT = "ask the coordinator for another plan, made with `fedtune plan`"
_KINDS = {"extra_forbidden": "plan-unknown-key", "missing": "plan-missing-key"}
_WORDS = {
    "plan-unknown-key": "a key that no plan has",
    "plan-missing-key": "no value for",
    "plan-bad-value": "a bad value in",
}
_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_PATH = re.compile(r"^([/\\~]|[A-Za-z]:[/\\])|(^|[/\\])\.\.?([/\\]|$)|\\|://")
_HASH = re.compile(r"[0-9a-f]{64}")


def read_plan(text: str) -> StudyPlan:
    """Return the plan that a coordinator sent, or refuse it with one of the codes above (PolicyError)."""
    _require_bounded(text)
    tree = _parsed(text)
    _require_data(tree, "plan")
    try:
        plan = StudyPlan.from_json(text)
    except (ConfigError, RecursionError) as error:
        raise _refusal(error) from error
    _require_consistent(plan)
    for place, name in _names(plan):
        if len(name) > _LONGEST_NAME or not name.isprintable() or _PATH.search(name):
            _refuse("plan-path", f"{place} holds a path, or signs that no name has")
    wrong = ", ".join(place for place, holds in _bounds(plan) if not holds)
    if wrong:
        _refuse("plan-bad-value", f"the plan has a bad value in: {wrong}")
    return plan


def _require_bounded(text: str) -> None:
    if len(text) > _LONGEST:
        _refuse("plan-too-large", f"the plan holds more than {_LONGEST} characters")
    marks = re.findall(r"[][{}]", _STRINGS.sub("", text))
    if max(accumulate(1 if mark in "[{" else -1 for mark in marks), default=0) > _DEEPEST:
        _refuse("plan-too-deep", f"the plan is nested deeper than {_DEEPEST}")


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        tree = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise PolicyError("plan-not-json", "the plan is no JSON", hint=_HINT) from error
    if not isinstance(tree, dict):
        _refuse("plan-not-json", "the plan is no JSON object")
    return tree


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= _LONGEST_NUMBER and abs(int(digits)) <= _LARGEST else _constant(digits)


def _float(digits: str) -> float:
    return float(digits) if len(digits) <= _LONGEST_NUMBER and abs(float(digits)) <= _LARGEST else _constant(digits)


def _constant(word: str) -> NoReturn:
    _refuse("plan-number", f"the plan holds the number {word[:20]}, which no setting can be")


def _require_data(value: Any, place: str) -> None:
    """Refuse every key that could name something to execute, wherever it stands."""
    if isinstance(value, list):
        for entry in value:
            _require_data(entry, place)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key.startswith("_"):
                _refuse("plan-executable", f"{place} has the key {key[:40]!r}; nothing in a plan is executed")
            _require_data(entry, place)


def _require_consistent(plan: StudyPlan) -> None:
    """Read what a plan holds as plain mappings: these have rules of their own."""
    try:
        promise = plan.promise
    except (PrivacyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise PolicyError("plan-promise", "the plan's privacy plan contradicts itself", hint=_HINT) from error
    if not isinstance(promise.unit, str):
        _refuse("plan-promise", "the plan's privacy unit is no text")
    try:
        plan.task  # noqa: B018 - read once, and kept by the plan
    except DataError as error:
        raise PolicyError("plan-task", "the plan's task contradicts itself", hint=_HINT) from error


def _names(plan: StudyPlan) -> Iterator[tuple[str, str]]:
    """Every text of a plan that names something and has no rule of its own; labels may be any text."""
    yield "model.name", plan.model.name
    yield "model.architecture", plan.model.architecture
    yield "privacy.unit", plan.promise.unit
    yield "data.partition.column", plan.data.partition.column or ""
    yield from ((f"data.task.columns.{role}", column) for role, column in plan.task.columns.items())
    yield from (("lora.targets", target) for target in plan.lora.targets if not isinstance(plan.lora.targets, str))


def _bounds(plan: StudyPlan) -> Iterator[tuple[str, bool]]:
    """Every value of a plan that is resolved and not set, so that no setting bounds it."""
    yield "model.sha256", _HASH.fullmatch(plan.model.sha256) is not None
    yield "adapter.layout_sha256", _HASH.fullmatch(plan.adapter.layout_sha256) is not None
    yield "model.head_scale", plan.model.head_scale > 0
    yield "data.max_tokens", plan.data.max_tokens > 1
    yield "data.holdout", 0 <= plan.data.holdout < 1
    yield "data.limit", plan.data.limit is None or plan.data.limit > 0
    adapter = plan.adapter
    sizes = adapter.upload, adapter.upload_bytes, adapter.download
    yield "adapter", 0 < adapter.trained <= adapter.numbers and min(sizes) > 0


def _refusal(error: Exception) -> PolicyError:
    """Say why a plan cannot be read: by its first unknown key, else its first missing one, else its first bad value."""
    if not isinstance(error.__cause__, ValidationError):
        return PolicyError("plan-not-canonical", "the plan is not in canonical form", hint=_HINT)
    found = [
        (_KINDS.get(entry["type"], "plan-bad-value"), ".".join(map(str, entry["loc"])))
        for entry in error.__cause__.errors(include_url=False, include_context=False, include_input=False)
    ]
    slug = min((slug for slug, _ in found), key=list(_WORDS).index)
    places = ", ".join(place[:80] for kind, place in found[:10] if kind == slug)
    return PolicyError(slug, f"the plan has {_WORDS[slug]}: {places}", hint=_HINT)


def _refuse(slug: str, message: str) -> NoReturn:
    raise PolicyError(slug, message, hint=_HINT)
