"""Questions to the person at the terminal, on standard error, so that standard output holds the result alone."""

import sys
from collections.abc import Callable
from functools import partial

import click

from fedtune.errors import ConfigError


def is_interactive() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def confirm(question: str, *, yes: bool) -> None:
    """Ask unless `yes`. Errors: `config.not-confirmed` where nobody can be asked, `config.declined`."""
    if yes:
        return
    if not is_interactive():
        hint = "use a terminal, or repeat it with --yes"
        raise ConfigError("not-confirmed", f"nobody is there to be asked: {question}", hint=hint)
    if not click.confirm(question, err=True):
        raise ConfigError("declined", "nothing was changed", hint="the same command asks again")


def asks(what: str, *, twice: bool) -> Callable[[], str]:
    """Return a question for a secret, which is not shown while it is typed; a new one is typed `twice`."""
    again = "once more" if twice else False
    return partial(
        click.prompt, what, default="", show_default=False, hide_input=True, confirmation_prompt=again, err=True
    )
