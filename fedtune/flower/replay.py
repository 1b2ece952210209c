"""Remembers which signed requests have been seen, for as long as their signatures are accepted, also across a restart.

A SuperNode signs nothing but a timestamp, which Flower accepts for 305 seconds; a header that was read anywhere on its
way would open the door again for that long. Each identity (a key and the timestamp it signed) is therefore let in once.

The memory is a file for every 32 seconds of timestamps, in a folder of its own: 16-byte digests, appended before a
request is let in, dropped as a whole when no timestamp in them is accepted any more. The files need no flush: what they
have to survive is the end of the process, and a machine that was off for longer than the window has nothing to replay.

Time never goes back here: after the clock is set back, old timestamps would be young again, so requests are refused
until the clock has caught up. What has been forgotten is written down before it is, so that this also holds across a
restart. Knows no HTTP and no signature.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from fedtune.flower.environment import hold

WINDOW = 320.0  # seconds; Flower accepts 305
AHEAD = 10.0  # seconds that a peer's clock may be before ours; Flower accepts 5
_SPAN = 32
_DIGEST = 16
_FORGOTTEN = "forgotten"

Verdict = Literal["new", "replayed", "stale", "clock-back", "full", "unwritable"]


class ReplayCache:
    """Lets each identity in once within `WINDOW` seconds; at most `capacity` identities are held, about 110 bytes each.

    One process may use a folder at a time: `transport.in-use`. Not safe for use by several threads.
    """

    def __init__(self, folder: Path, *, capacity: int = 200_000, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._capacity, self._clock = folder, capacity, clock
        self._lock = hold(folder)
        self._spans: dict[int, set[bytes]] = {}
        self._files: dict[int, int] = {}
        self._latest = clock()
        self._load()

    def __len__(self) -> int:
        return sum(map(len, self._spans.values()))

    def admit(self, identity: bytes, signed_at: float) -> Verdict:
        """Return `new` once for an identity that was signed at a Unix time, and why not otherwise."""
        now = self._clock()
        if now < self._latest - AHEAD:
            return "clock-back"
        self._latest = max(self._latest, now)
        self._forget()
        if not self._latest - WINDOW < signed_at < now + AHEAD:
            return "stale"
        span = int(signed_at // _SPAN)
        digest = hashlib.blake2b(identity, digest_size=_DIGEST).digest()
        if digest in self._spans.get(span, ()):
            return "replayed"
        if len(self) >= self._capacity:
            return "full"
        if not self._write(span, digest):
            return "unwritable"
        self._spans.setdefault(span, set()).add(digest)
        return "new"

    def close(self) -> None:
        """Let another process use the folder."""
        for descriptor in (*self._files.values(), self._lock):
            os.close(descriptor)
        self._files.clear()

    def _load(self) -> None:
        for path in self._folder.glob("*.seen"):
            if not path.stem.isdecimal():
                continue
            raw = path.read_bytes()
            span, whole = int(path.stem), len(raw) - len(raw) % _DIGEST
            os.truncate(path, whole)  # a kill in the middle of a write: that request was never let in
            self._spans[span] = {raw[start : start + _DIGEST] for start in range(0, whole, _DIGEST)}
            if whole:
                self._latest = max(self._latest, span * _SPAN - AHEAD)
        with suppress(OSError, ValueError):  # nothing was ever forgotten
            forgotten = int((self._folder / _FORGOTTEN).read_text(encoding="ascii"))
            self._latest = max(self._latest, (forgotten + 1) * _SPAN + WINDOW)
        self._forget()

    def _forget(self) -> None:
        """Drop what no timestamp of is accepted any more; what cannot be written down as forgotten is remembered."""
        old = [span for span in self._spans if (span + 1) * _SPAN <= self._latest - WINDOW]
        if not old or not self._note_forgotten(max(old)):
            return
        for span in old:
            del self._spans[span]
            if span in self._files:
                os.close(self._files.pop(span))
            self._path(span).unlink(missing_ok=True)

    def _note_forgotten(self, span: int) -> bool:
        try:
            made = self._folder / f"{_FORGOTTEN}.new"
            made.write_text(str(span), encoding="ascii")
            made.replace(self._folder / _FORGOTTEN)
        except OSError:
            return False
        return True

    def _write(self, span: int, digest: bytes) -> bool:
        """Append a digest; what a failed write leaves is cut off, or nothing follows it: records have one length."""
        try:
            descriptor = self._files.get(span)
            if descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                descriptor = self._files[span] = os.open(self._path(span), flags, 0o600)
            size = os.fstat(descriptor).st_size
            if size % _DIGEST == 0 and os.write(descriptor, digest) == _DIGEST:
                return True
            os.ftruncate(descriptor, size - size % _DIGEST)
        except OSError:
            pass
        return False

    def _path(self, span: int) -> Path:
        return self._folder / f"{span}.seen"
