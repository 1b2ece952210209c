"""What a study learns from a table: the kind of task, the columns that hold it, and the labels.

A `Task` is part of the plan and travels, so it names columns and never a path. Knows no tokenizer and no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from fedtune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fedtune.config.schema import DataSettings

Kind = Literal["classification", "causal-lm"]
Style = Literal["classification", "text", "prompt", "instruction", "messages"]

# The roles of each style, in order; `input` alone may be missing.
ROLES: dict[Style, tuple[str, ...]] = {
    "classification": ("text", "label"),
    "text": ("text",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "messages": ("messages",),
}
OPTIONAL = frozenset({"input"})

# Names under which each role is usually found when no key names it; the role's own name always wins.
_USUAL: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "utterance", "document", "body"),
    "label": ("label", "category", "intent", "class", "target"),
    "prompt": ("prompt", "question"),
    "completion": ("completion", "answer", "response"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output", "response"),
    "messages": ("messages",),
}
_HINT = (
    "name the columns: data.text and data.label; data.text alone; data.prompt and data.completion; "
    "data.instruction and data.output; or data.messages"
)


@dataclass(frozen=True, slots=True)
class Task:
    """One task: `columns` maps each role of the style to the column that holds it.

    `labels` are the class names, sorted by code point, so that class i is the same class on every machine; empty for
    causal language modelling.
    """

    style: Style
    columns: Mapping[str, str]
    labels: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        required = set(ROLES[self.style]) - OPTIONAL
        if not required <= set(self.columns) <= set(ROLES[self.style]):
            raise ValueError(f"a {self.style} task has the roles {ROLES[self.style]}, not {tuple(self.columns)}")
        if list(self.labels) != sorted(set(self.labels)):
            raise ValueError("labels must be unique and sorted")

    def __hash__(self) -> int:
        return hash((self.style, tuple(sorted(self.columns.items())), self.labels))

    @property
    def kind(self) -> Kind:
        """Which head and loss the task needs."""
        return "classification" if self.style == "classification" else "causal-lm"

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that the task reads, in the order of its roles."""
        return tuple(self.columns[role] for role in ROLES[self.style] if role in self.columns)

    def with_labels(self, labels: Sequence[str]) -> Task:
        """Return the task with these class names, sorted."""
        return replace(self, labels=tuple(sorted(set(labels))))

    def to_dict(self) -> dict[str, object]:
        """Return the task as plain JSON values."""
        return {"style": self.style, "columns": dict(self.columns), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, value: Mapping[str, object]) -> Task:
        """Read what `to_dict` wrote; anything else is `data.bad-task`."""
        try:
            form = _TaskForm.model_validate(value)
            return cls(form.style, form.columns, form.labels)
        except ValueError as error:
            raise DataError(
                "bad-task", f"the plan's task cannot be read: {error}", hint="make the plan again: fedtune plan"
            ) from error


class _TaskForm(BaseModel):
    """The types of a task in a plan, which another machine wrote."""

    model_config = ConfigDict(extra="forbid")

    style: Style
    columns: dict[str, str]
    labels: tuple[str, ...]


def find_task(settings: DataSettings, column_names: Sequence[str]) -> Task:
    """Find the task from the columns that the settings name, or else from columns with usual names.

    Named columns decide: the style is the one whose roles cover them, `text` alone being causal language modelling
    unless `data.task` says otherwise; roles without a name are filled by usual names (`category` for `label`,
    `question` for `prompt`, …). With no column named, every style whose roles are all found is a candidate, and more
    than one candidate is an error, never a guess. Labels are left empty; `find_labels` fills them.
    Raises `data.conflicting-columns`, `data.missing-column`, `data.no-task`, `data.ambiguous-task`.
    """
    named = {role: name for role in _USUAL if (name := getattr(settings, role)) is not None}
    wanted = [style for style in ROLES if settings.task in {"auto", _kind(style)}]
    if named:
        return _task_of_named(named, wanted, column_names)
    complete = {style: columns for style in wanted if (columns := _usual_columns(style, column_names))}
    if "classification" in complete:
        complete.pop("text", None)
    if len(complete) > 1:
        styles = " or ".join(f"{style} ({', '.join(columns.values())})" for style, columns in complete.items())
        raise DataError("ambiguous-task", f"the columns fit more than one task: {styles}", hint=_HINT)
    if not complete:
        listed = ", ".join(column_names)
        raise DataError("no-task", f"no task is recognised from the columns {listed}", hint=_HINT)
    (style, columns) = complete.popitem()
    return Task(style, columns)


def _kind(style: Style) -> Kind:
    return "classification" if style == "classification" else "causal-lm"


def _task_of_named(named: Mapping[str, str], wanted: Sequence[Style], column_names: Sequence[str]) -> Task:
    """Take the style that covers the named roles with the fewest others, then fill those by usual names."""
    covering = [style for style in wanted if set(named) <= set(ROLES[style])]
    if not covering:
        keys = ", ".join(f"data.{role}={name}" for role, name in named.items())
        raise DataError("conflicting-columns", f"{keys} do not belong to one task", hint=_HINT)
    style = min(covering, key=lambda style: len(ROLES[style]))
    columns = {}
    for role in ROLES[style]:
        name = named.get(role) or _usual_column(role, column_names)
        if name is not None:
            columns[role] = name
        elif role not in OPTIONAL:
            listed = ", ".join(column_names)
            raise DataError(
                "missing-column",
                f"a {style} task needs a column for '{role}'; the columns: {listed}",
                hint=f"name it: data.{role}=COLUMN",
            )
    return Task(style, columns)


def _usual_columns(style: Style, column_names: Sequence[str]) -> dict[str, str] | None:
    """Return role → column by usual names, or None when a required role is not found."""
    found = {role: name for role in ROLES[style] if (name := _usual_column(role, column_names))}
    return found if set(ROLES[style]) - OPTIONAL <= set(found) else None


def _usual_column(role: str, column_names: Sequence[str]) -> str | None:
    """Return the column whose name is usual for a role; two of them, neither being the role's own name, is an error."""
    if role in column_names:
        return role
    found = [name for name in column_names if name.lower() in _USUAL[role]]
    if len(found) > 1:
        raise DataError(
            "ambiguous-task",
            f"'{role}' could be any of the columns {', '.join(found)}",
            hint=f"say which: data.{role}=…",
        )
    return found[0] if found else None
