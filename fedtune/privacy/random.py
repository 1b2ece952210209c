"""Where randomness comes from: a seeded stream for studies, a cryptographic one for anything that is released.

Both turn raw 64-bit words into uniforms and normals in the same way, so that a mechanism cannot tell them apart; only
the `name` differs, and the plan states it. Knows nothing of gradients or batches. Torch's CPU generator is never used
(it keeps 32 bits of its seed, few enough to try them all), only torch's vector arithmetic.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedtune.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Callable

Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
NoiseName = Literal["seeded", "secure"]

# Normals are made so many at a time, in memory that stays in the processor's cache.
BLOCK = 2**15
# Below it a 63-bit radius gets 11 bits more, which float64 still holds exactly; above it they would change nothing.
NEAR_ZERO = 2**41


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
    signed = (words >> np.uint64(12)).view(np.int64)  # the same numbers, in the type that converts faster
    drawn = signed.astype(np.float64)
    drawn += 0.5
    drawn *= 2.0**-52
    return drawn


def normals(words: Words, out: Floats | None = None) -> Floats:
    """Map 2m uniform 64-bit words to 2m standard normals: √(-2 ln u)·cos θ and √(-2 ln u)·sin θ (Box, Muller 1958).

    The words are read as signed integers. The first m give u = |word|·2⁻⁶³, the others θ = π·2⁻⁶³·word. Below 2⁻²² the
    low 11 bits of θ's word extend u to 74 bits; given them, θ is still one of 2⁵³ equally spaced angles.

    =======================  =====================================================
    largest radius           10.2; a pair further out has probability 2⁻⁷⁵
    neighbouring radii       less than 2⁻³⁰ apart, except with probability 2⁻⁴⁶
    neighbouring angles      less than 2⁻⁵⁰ apart
    error of the evaluation  a few 2⁻⁵³ of the radius
    =======================  =====================================================

    (With a plain 53-bit u, radii near 7 would lie 2⁻²⁰ apart and end at 8.6.)
    """
    import torch

    radial, angular = torch.from_numpy(words.view(np.int64)).chunk(2)
    radius = radial.double().abs_()
    if float(radius.min()) < NEAR_ZERO:
        near = (radius < NEAR_ZERO).nonzero()[:, 0]
        magnitude = radial[near] ^ (radial[near] >> 63)  # -1 - k and k alike become k, and no sum can overflow
        radius[near] = (angular[near] & 0x7FF).double().add_(0.5).mul_(2.0**-11).add_(magnitude)
    radius.mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
    angle = angular.double().mul_(math.pi * 2.0**-63)
    drawn = np.empty(len(words)) if out is None else out
    cosines, sines = torch.from_numpy(drawn).chunk(2)
    torch.cos(angle, out=cosines).mul_(radius)
    torch.sin(angle, out=sines).mul_(radius)
    return drawn


def _in_blocks(words: Callable[[int], Words], n: int) -> Floats:
    """Draw n normals; of an odd number one more is drawn and dropped."""
    out = np.empty(n + n % 2)
    for start in range(0, n, BLOCK):
        block = out[start : start + BLOCK]
        normals(words(len(block)), out=block)
    return out[:n]


class SeededSource:
    """A reproducible stream named by words (study seed, site, round, purpose); the same words give the same stream.

    The words are hashed by SHA-256, each with its type and length, so that ("a", "bc") and ("ab", "c") or 1 and "1"
    name different streams, and all 256 bits seed PCG64DXSM. Only its raw words are used: NumPy keeps those stable
    between versions, its distributions it does not. Between machines normals agree up to the last bits of sin, cos and
    log. Whoever knows the words knows the noise: not for release.
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
        return _in_blocks(self._words, n)


class SecureSource:
    """An unpredictable stream: the keystream of AES-256 in counter mode under a key from the operating system.

    The key is never stored or shown. A forked process gets a key of its own, because two processes with one keystream
    would add the same noise, and their difference would show the data. Normals end at |z| of about 10, an event
    of probability 2⁻⁷⁵ a pair.
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
        keystream = bytearray(8 * n + 15)  # update_into asks for one block more, less a byte
        self._stream.update_into(bytes(8 * n), keystream)
        return np.frombuffer(keystream, dtype=np.uint64, count=n)

    def uniform(self, n: int) -> Floats:
        """Return n independent uniforms, each strictly between 0 and 1."""
        return uniforms(self._words(n))

    def normal(self, n: int) -> Floats:
        """Return n independent standard normals, each finite."""
        return _in_blocks(self._words, n)
