"""Reads journals as anybody can: each line is JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def bodies(journal: Path) -> list[dict[str, Any]]:
    """Return what each whole record says; none where there is no journal yet."""
    if not journal.exists():
        return []
    *lines, _torn = journal.read_text("utf-8").split("\n")
    return [json.loads(line)["body"] for line in lines]


def entries(journal: Path, kind: str) -> list[dict[str, Any]]:
    """Return the entries of one kind, in their order."""
    return [body["entry"] for body in bodies(journal) if body["kind"] == kind]


def charged_rounds(journal: Path) -> list[int]:
    """Return the rounds that were reserved, one for each reservation."""
    return [entry["round"] for entry in entries(journal, "reserve")]
