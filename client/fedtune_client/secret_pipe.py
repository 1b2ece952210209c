"""Hands what unlocks the vault to a child process that may be started again, without a file and without a variable.

A named pipe in a folder of this user alone: the bytes go from one process's memory to the other's. What a child has in
its environment can be read as long as it lives, in /proc by every process of this user and in a crash report by whoever
gets it; a file would outlive its purpose. Knows no child.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtune.errors import VaultError
from fedtune_client.vault import Key, Unlock
from fedtune_client.vault.unlock import KEY_VARIABLE, PASSPHRASE_VARIABLE

_MOST = 65_536
_TRIES = 100


@contextmanager
def offered(pipe: Path, unlock: Unlock) -> Iterator[Path]:
    """Give the secret to every process that opens the pipe while the block runs; the pipe is removed after it."""
    os.mkfifo(pipe, 0o600)
    ended = threading.Event()
    thread = threading.Thread(target=_offer, args=(pipe, _dump(unlock), ended), name="secret", daemon=True)
    thread.start()
    try:
        yield pipe
    finally:
        ended.set()
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # the thread waits for one
        thread.join()
        os.close(reader)
        pipe.unlink(missing_ok=True)


def receive(pipe: Path) -> Mapping[str, str]:
    """Return the secret as the variable that `unlock_from` looks for; waits until it is offered.

    Error: `vault.locked` when there is no such pipe, or nothing of the kind comes through it.
    """
    for _ in range(_TRIES):  # a reader that comes while another leaves can find the pipe closed
        try:
            with pipe.open("rb") as file:
                found = json.loads(file.readline(_MOST))
            return {str(name): str(value) for name, value in found.items()}
        except FileNotFoundError:
            break
        except (OSError, ValueError, AttributeError):
            continue
    hint = "start the client anew: fedtune client up"
    raise VaultError("locked", "nothing came through the pipe that unlocks the vault", hint=hint)


def _dump(unlock: Unlock) -> bytes:
    given = {KEY_VARIABLE: unlock.data.hex()} if isinstance(unlock, Key) else {PASSPHRASE_VARIABLE: unlock.text}
    return json.dumps(given).encode() + b"\n"


def _offer(pipe: Path, secret: bytes, ended: threading.Event) -> None:
    """Write a line to each reader; while one has the pipe open it can get several, and looks at the first alone."""
    while not ended.is_set():
        with suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:  # waits until somebody reads
            if not ended.is_set():
                file.write(secret)
