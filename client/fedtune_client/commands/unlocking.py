"""How the commands get what unlocks a vault or an export: an option, the environment, or a person at a terminal.

A secret is never an argument: arguments are seen by every user of a machine and kept in a shell's history.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedtune.errors import ConfigError, VaultError

if TYPE_CHECKING:
    from fedtune_client.vault import Unlock

kinds = ("KEY_FILE", "KEY", "PASSPHRASE")


def unlock(
    key_file: Path | None, variables: str = "FEDTUNE_VAULT", what: str = "passphrase of the vault", *, new: bool = False
) -> "Unlock":
    """Return a key or a passphrase: the first of the option, `variables`_KEY_FILE, _KEY, _PASSPHRASE, and an answer.

    A `new` passphrase is typed twice and has a length. Errors: `vault.locked`, `vault.weak-passphrase`,
    `vault.bad-key`, `vault.no-key-file`, `vault.permissions`.
    """
    from fedtune_client.vault import unlock_from

    given = {f"FEDTUNE_VAULT_{kind}": os.environ.get(f"{variables}_{kind}", "") for kind in kinds}
    try:
        found = unlock_from(given, key_file=key_file, ask=_asks(what, twice=new) if is_interactive() else None)
    except VaultError as error:
        if error.code != "vault.locked":
            raise
        hint = f"set {variables}_KEY_FILE, {variables}_KEY or {variables}_PASSPHRASE, or use a terminal"
        raise VaultError("locked", f"nothing is given as {what}", hint=hint) from None
    if new:
        found.check()
    return found


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


def _asks(what: str, *, twice: bool) -> Callable[[], str]:
    again = "once more" if twice else False
    return partial(
        click.prompt, what, default="", show_default=False, hide_input=True, confirmation_prompt=again, err=True
    )
