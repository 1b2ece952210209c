"""What unlocks a vault: a passphrase that a person types, or a 32-byte key that a service is given.

Neither is ever shown: not by `repr`, not in an error. What is asked of a new passphrase is its length alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.errors import VaultError
from fedtune_client.vault.files import read_private
from fedtune_client.vault.sealing import KEY_BYTES

KEY_FILE_VARIABLE = "FEDTUNE_VAULT_KEY_FILE"
KEY_VARIABLE = "FEDTUNE_VAULT_KEY"
PASSPHRASE_VARIABLE = "FEDTUNE_VAULT_PASSPHRASE"  # noqa: S105 - the variable's name
SHORTEST = 12
_HEX_KEY = re.compile(r"[0-9A-Fa-f]{64}")


@dataclass(frozen=True, slots=True)
class Passphrase:
    """A passphrase; scrypt makes each guess cost 128 MiB and some tenths of a second."""

    text: str = field(repr=False)

    def __post_init__(self) -> None:
        if any("\ud800" <= letter <= "\udfff" for letter in self.text):  # how Python spells bytes that are no UTF-8
            hint = "type it in a UTF-8 terminal, or take a key file"
            raise VaultError("bad-passphrase", "the passphrase is not UTF-8 text", hint=hint)

    def check(self) -> None:
        """Refuse a new passphrase that is too short; an old one is opened whatever its length."""
        if (length := len(unicodedata.normalize("NFC", self.text))) < SHORTEST:
            raise VaultError(
                "weak-passphrase",
                f"the passphrase has {length} characters, a vault's has at least {SHORTEST}",
                hint="take several random words, or a key file",
            )


@dataclass(frozen=True, slots=True)
class Key:
    """A random key of 32 bytes; it costs no scrypt."""

    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.data) != KEY_BYTES:
            raise VaultError("bad-key", f"the vault's key has {len(self.data)} bytes, not {KEY_BYTES}", hint=_MAKE_KEY)

    def check(self) -> None:
        """Accept: nothing shorter can be constructed."""

    @classmethod
    def from_hex(cls, text: str, where: str) -> Key:
        """Read 64 hexadecimal digits; `where` names their place in an error."""
        if not _HEX_KEY.fullmatch(text):
            raise VaultError("bad-key", f"{where} does not hold {KEY_BYTES} bytes as a key does", hint=_MAKE_KEY)
        return cls(bytes.fromhex(text))

    @classmethod
    def from_file(cls, path: Path) -> Key:
        """Read a key file of this user alone: 32 bytes, or 64 hexadecimal digits with or without a newline."""
        data = read_private(path, most=2 * KEY_BYTES + 2)
        if data is None:
            raise VaultError("no-key-file", f"there is no key file {path}", hint=_MAKE_KEY)
        if len(data) == KEY_BYTES:
            return cls(data)
        return cls.from_hex(data.decode("ascii", errors="replace").rstrip("\r\n"), f"the key file {path}")


Unlock = Passphrase | Key
_MAKE_KEY = "a new key: (umask 077; head -c 32 /dev/urandom > FILE), then name FILE with FEDTUNE_VAULT_KEY_FILE"


def unlock_from(
    environment: Mapping[str, str], *, key_file: Path | None = None, ask: Callable[[], str] | None = None
) -> Unlock:
    """Return what unlocks the vault: the first that is given, and no second one is tried.

    In order: `key_file` (the command's option), FEDTUNE_VAULT_KEY_FILE, FEDTUNE_VAULT_KEY (64 hexadecimal digits),
    FEDTUNE_VAULT_PASSPHRASE, and `ask()` (a prompt). An empty variable, or an empty answer, is none.

    Errors: `vault.locked` when there is none; `vault.bad-key`, `vault.no-key-file`, `vault.permissions`.
    """
    if key_file is not None:
        return Key.from_file(key_file)
    if path := environment.get(KEY_FILE_VARIABLE):
        return Key.from_file(Path(path).expanduser())
    if text := environment.get(KEY_VARIABLE):
        return Key.from_hex(text, KEY_VARIABLE)
    if text := environment.get(PASSPHRASE_VARIABLE):
        return Passphrase(text)
    if ask is not None and (text := ask()):
        return Passphrase(text)
    raise VaultError(
        "locked",
        "the vault is locked, and nothing is given to unlock it",
        hint=f"set {KEY_FILE_VARIABLE}, {KEY_VARIABLE} or {PASSPHRASE_VARIABLE}, name a key file, or use a terminal",
    )
