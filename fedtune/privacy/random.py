"""Where randomness comes from: a seeded stream for studies, a cryptographic one for anything that is released.

Both turn raw 64-bit words into uniforms and normals in the same way, so that a mechanism cannot tell them apart; only
the `name` differs, and the plan states it. Knows nothing of gradients, batches or torch. Torch's CPU generator is never
used: it keeps 32 bits of its seed, few enough to try them all.
"""

from __future__ import annotations

import hashlib
import os
from typing import Literal, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri

from fedtune.errors import PrivacyError

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
NoiseName = Literal["seeded", "secure"]


class RandomSource(Protocol):
    """A stream of independent draws; asking for more continues it, nothing rewinds it."""

    @property
    def name(self) -> NoiseName:
        """What the plan and the release call this source."""

    def uniform(self, n: int) -> Floats:
        """Return n independent uniforms, each strictly between 0 and 1."""

    def normal(self, n: int) -> Floats:
        """Return n independent standard normals, each finite."""


def uniforms(words: Words) -> Floats:
    """Map uniform 64-bit words to the midpoints (k + 1/2)·2⁻⁵², k = 0 … 2⁵² - 1.

    Every midpoint is exact in float64 and neither 0 nor 1 is among them. (With 53 bits, k + 1/2 would round for large
    k, and the largest to 1.) A comparison `u < q` is true with probability within 2⁻⁵³ of q.
    """
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normals(words: Words) -> Floats:
    """Map 2n uniform 64-bit words to n standard normals by the inverse distribution function in one tail.

    A sign bit and a 127-bit uniform p in (0, 1/2] give ±Φ⁻¹(p). p keeps float64's *relative* precision near 0, so
    neighbouring values are at most about 2⁻⁵⁰ apart in the whole range and the tail reaches to |z| of about 13
    (a plain 53-bit uniform stops at 8.2 and leaves gaps of 10⁻⁵ there, which low-order bits could betray).
    """
    high, low = words[0::2], words[1::2]
    negative = (low & np.uint64(1)).astype(bool)
    tail = (high.astype(np.float64) + ((low >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-63) * 2.0**-65
    z: Floats = ndtri(tail)
    return np.where(negative, z, -z)


class SeededSource:
    """A reproducible stream named by words (study seed, site, round, purpose); the same words give the same stream.

    The words are hashed by SHA-256, each with its type and length, so that ("a", "bc") and ("ab", "c") or 1 and "1"
    name different streams, and all 256 bits seed PCG64DXSM. Only its raw words are used: NumPy keeps those stable
    between versions, its distributions it does not. Whoever knows the words knows the noise: not for release.
    """

    name: NoiseName = "seeded"

    def __init__(self, *words: int | str) -> None:
        if not words:
            raise PrivacyError("unnamed-stream", "a seeded source was asked for without a seed.")
        digest = hashlib.sha256()
        for word in words:
            text = (f"str:{word}" if isinstance(word, str) else f"int:{int(word)}").encode()
            digest.update(len(text).to_bytes(8, "big") + text)
        self._bits = np.random.PCG64DXSM(np.random.SeedSequence(int.from_bytes(digest.digest(), "big")))

    def _words(self, n: int) -> Words:
        return np.atleast_1d(self._bits.random_raw(n)).astype(np.uint64, copy=False)

    def uniform(self, n: int) -> Floats:
        """Return n independent uniforms, each strictly between 0 and 1."""
        return uniforms(self._words(n))

    def normal(self, n: int) -> Floats:
        """Return n independent standard normals, each finite."""
        return normals(self._words(2 * n))


class SecureSource:
    """An unpredictable stream: the keystream of AES-256 in counter mode under a key from the operating system.

    The key is never stored or shown. A forked process gets a key of its own, because two processes with one keystream
    would add the same noise, and their difference would show the data. Normals are truncated at |z| of about 13,
    an event of probability 2⁻¹²⁷ a draw.
    """

    name: NoiseName = "secure"

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        self._owner = os.getpid()
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def __reduce__(self) -> tuple[object, ...]:
        """Let a copy start a stream of its own."""
        return (SecureSource, ())

    def _words(self, n: int) -> Words:
        if os.getpid() != self._owner:
            self._rekey()
        return np.frombuffer(self._stream.update(bytes(8 * n)), dtype=np.uint64)

    def uniform(self, n: int) -> Floats:
        """Return n independent uniforms, each strictly between 0 and 1."""
        return uniforms(self._words(n))

    def normal(self, n: int) -> Floats:
        """Return n independent standard normals, each finite."""
        return normals(self._words(2 * n))
