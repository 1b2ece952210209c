"""Consent of each record: which rows may be used at all, by a column of the data or by a list of ids.

What is left of a table, `table.take(allowed.rows)`, is all that later stages see: a record without opt-in becomes no
record, example, batch or count, and is in no fingerprint of the records *used*. The grant for a data set binds the
fingerprint of its whole file, which is older than this choice. Where the question cannot be answered, a record is out,
and a rule that cannot be read allows nobody. Knows no grant, no plan and no journal; no error quotes a cell or an id.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedtune.data.plain import folded, plain_text
from fedtune.data.table import Table
from fedtune.errors import ConsentError, DataError

_COMMENT = re.compile(r"(^|\s)#.*")
_WHOLE_NUMBER = re.compile(r"0*(\d+)(\.0*)?")


@dataclass(frozen=True, slots=True)
class ByColumn:
    """A record opts in by one of `values` in `column`; case and the spaces around it do not matter."""

    column: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ByList:
    """A record opts in by the id in `column`, which `file` names as one that opted in, or does not name as one out."""

    column: str
    file: Path
    listed: Literal["in", "out"]


OptIn = ByColumn | ByList


@dataclass(frozen=True, slots=True, eq=False)
class Allowed:
    """The rows (n,) that may be used, ascending; `unknown` listed ids that no record has.

    `source_sha256` is the SHA-256 of the list as it was read, or of the rule where it stands in a column.
    """

    rows: NDArray[np.int64]
    unknown: int
    source_sha256: str


def allowed_rows(table: Table, rule: OptIn) -> Allowed:
    """Return the rows of a table that its rule allows. Each record stands for itself, whatever its unit's others say.

    | case                                        | the record                                                   |
    |---------------------------------------------|--------------------------------------------------------------|
    | its cell is blank, a list or a mapping      | is out                                                       |
    | its id is on no list                        | is out of an opt-in, in with an opt-out                      |
    | ids that differ in case, zeros before, `.0` | differ for an opt-in; are one for an opt-out, so that nobody |
    |                                             | stays in because a spreadsheet rewrote an id                 |

    A list has one id a line, in UTF-8; what follows `#` at a line's start or after a space is a comment.

    Raises ConsentError: `missing-column`, `no-values`, `unreadable-list`, and `empty-list` for an opt-out of nobody
    that has not even a comment to say so.
    """
    if isinstance(rule, ByColumn):
        return _by_column(table, rule)
    content = _read(rule.file)
    same = plain_text if rule.listed == "in" else _loosely
    listed = set(map(same, _ids(content, rule)))
    names = [same(text) if text else "" for text in _texts(table, rule.column)]
    wanted = listed.__contains__ if rule.listed == "in" else lambda name: name not in listed
    return Allowed(_rows(names, wanted), len(listed.difference(names)), hashlib.sha256(content).hexdigest())


def _by_column(table: Table, rule: ByColumn) -> Allowed:
    accepted = {_label(value) for value in rule.values} - {""}
    if not accepted:
        hint = "name the values that mean yes in the policy"
        raise ConsentError("no-values", f"the rule for column '{rule.column}' accepts no value", hint=hint)
    stated = json.dumps({"column": rule.column, "values": sorted(accepted)}, sort_keys=True, separators=(",", ":"))
    answers = [_label(text) for text in _texts(table, rule.column)]
    return Allowed(_rows(answers, accepted.__contains__), 0, hashlib.sha256(stated.encode()).hexdigest())


def _rows(names: list[str], wanted: Callable[[str], bool]) -> NDArray[np.int64]:
    return np.flatnonzero([bool(name) and wanted(name) for name in names]).astype(np.int64)


def _texts(table: Table, column: str) -> list[str]:
    """Return each cell of a column as text; blank for one that holds no single value."""
    try:
        cells = table.column(column)
    except DataError as error:
        hint = error.hint if "did you mean" in error.hint else "correct the column of the consent rule in the policy"
        raise ConsentError("missing-column", error.message, hint=hint) from error
    return ["" if isinstance(cell, list | tuple | dict) else plain_text(cell) for cell in cells]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConsentError(
            "unreadable-list",
            f"the list {file} of who opted in or out cannot be read ({error.strerror or error})",
            hint="put it back or correct its path in the policy; until then no record is used",
        ) from error


def _ids(content: bytes, rule: ByList) -> set[str]:
    """Return the ids of a list; any of the three line ends of text files ends a line."""
    try:
        lines = re.split(r"\r\n|\r|\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        hint = "save it as UTF-8 text, one id a line"
        raise ConsentError("unreadable-list", f"the list {rule.file} is not UTF-8 text", hint=hint) from error
    if rule.listed == "out" and not any(map(str.strip, lines)):
        raise ConsentError(
            "empty-list",
            f"the list {rule.file} of who opted out is empty, as a copy that failed would be",
            hint="if nobody opted out, say so in a comment: # nobody has opted out",
        )
    return {text for line in lines if (text := _COMMENT.sub("", line).strip())}


def _label(text: str) -> str:
    return folded(plain_text(text))


def _loosely(text: str) -> str:
    """Return what is left of an id after all that spreadsheets and keyboards change in one."""
    name = folded(unicodedata.normalize("NFKC", text))
    number = _WHOLE_NUMBER.fullmatch(name)
    return number[1] if number else name
