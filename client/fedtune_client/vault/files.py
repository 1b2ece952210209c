"""The vault's private files: those of `fedtune.run.private_files`, with the vault's errors."""

from __future__ import annotations

from fedtune.errors import VaultError
from fedtune.run.private_files import PrivateFiles

_FILES = PrivateFiles(VaultError, "what the vault held is as before")
write_private, read_private, remove_file = _FILES.write, _FILES.read, _FILES.remove
make_private_folder, check_private = _FILES.make_folder, _FILES.check
locked, disk_errors = _FILES.locked, _FILES.disk_errors
