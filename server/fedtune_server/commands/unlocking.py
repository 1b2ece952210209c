"""How the commands get what unlocks the federation's authority: an option, the environment, or a person at a terminal.

A secret is never an argument: arguments are seen by every user of a machine and kept in a shell's history.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.commands.asking import asks, is_interactive
from fedtune.errors import EnrolmentError

if TYPE_CHECKING:
    from fedtune.pki.authority import Secret

key_file_variable = "FEDTUNE_AUTHORITY_KEY_FILE"
passphrase_variable = "FEDTUNE_AUTHORITY_PASSPHRASE"  # noqa: S105 - the variable's name
what = "passphrase of the authority"
_hex_key = re.compile(rb"[0-9A-Fa-f]{64}\r?\n?")
_most_bytes = 66  # 64 digits and the end of a line


def unlock(key_file: Path | None, *, new: bool = False) -> "Secret":
    """Return the first that is given of the option, the variables and an answer; a `new` passphrase is typed twice.

    Errors: `enrolment.locked`, `enrolment.no-key-file`, `enrolment.permissions`, `enrolment.bad-secret`.
    """
    from fedtune.pki.authority import Secret

    path = key_file or _path(os.environ.get(key_file_variable, ""))
    if path is not None:
        return Secret.key(_key(path))
    text = os.environ.get(passphrase_variable, "") or (asks(what, twice=new)() if is_interactive() else "")
    if not text:
        hint = f"set {key_file_variable} or {passphrase_variable}, name a key with --key-file, or use a terminal"
        raise EnrolmentError("locked", f"nothing is given as {what}", hint=hint)
    found = Secret.passphrase(text)
    if new:
        found.check()
    return found


def _path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def _key(path: Path) -> bytes:
    """Read a key file of this user alone: 32 bytes, or 64 hexadecimal digits with or without a newline."""
    from fedtune.pki.files import read_private

    data = read_private(path, most=_most_bytes + 1)
    if data is None:
        hint = "a new key: (umask 077; head -c 32 /dev/urandom > FILE)"
        raise EnrolmentError("no-key-file", f"there is no key file {path}", hint=hint)
    return bytes.fromhex(data.decode()) if _hex_key.fullmatch(data) else data
