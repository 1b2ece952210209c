"""What a check has found, and what it may look at. Knows no check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Literal

from fedtune.errors import FedtuneError
from fedtune_client.enrolment import Credentials
from fedtune_client.facts import SiteFacts
from fedtune_client.folder import OpenSite, SiteFolder
from fedtune_client.view import SiteView

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence on one thing; `code` is that of the error behind it, if there is one, and `hint` what to do."""

    check: str
    level: Level
    text: str
    hint: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """A site as far as it could be opened: None is what could not be, which another finding says."""

    folder: SiteFolder
    facts: SiteFacts
    now: datetime
    site: OpenSite | None = None
    seen: SiteView | None = None
    taken: Credentials | None = None


Check = Callable[[Subject], Iterator[Finding]]


def checked(name: str) -> Callable[[Callable[[Subject], Iterator[tuple[Level, str, str]]]], Check]:
    """Make a check of a function that yields level, sentence and hint; an expected error of it is a failure."""

    def decorate(ask: Callable[[Subject], Iterator[tuple[Level, str, str]]]) -> Check:
        @wraps(ask)
        def check(subject: Subject) -> Iterator[Finding]:
            try:
                for level, text, hint in ask(subject):
                    yield Finding(name, level, text, hint)
            except FedtuneError as error:
                yield failure(name, error)

        return check

    return decorate


def failure(name: str, error: FedtuneError) -> Finding:
    """Return what an error says."""
    return Finding(name, "fail", error.message, error.hint, error.code)
