"""How a Flower process gives back what large messages have taken; with another C library than glibc, less of it.

Requests and answers of 5 MiB leave two kinds of litter. Cycles of objects hold them until the collector looks through
everything, which it does the more rarely the more there is. And glibc, once such a block has been freed, takes all
later ones from its heaps, where they leave holes. Knows no message.
"""

from __future__ import annotations

import ctypes
import gc
from functools import cache

_LARGE = 2**20
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h


def keep_large_blocks_apart() -> None:
    """Take blocks of 1 MiB and more from the system and give them back when they are freed: call it first.

    That is slow for what computes with such blocks, and right for what passes them on.
    """
    for option, value in ((_M_ARENA_MAX, 2), (_M_MMAP_THRESHOLD, _LARGE)):
        if hasattr(_c_library(), "mallopt"):
            _c_library().mallopt(option, value)


def forget_the_start() -> None:
    """Leave everything that is there now out of all collections, which are cheap and frequent from now on."""
    gc.collect()
    gc.freeze()
    gc.collect()  # how rare the next one is depends on what this one finds
    gc.set_threshold(700, 2, 2)


def drop_young_cycles() -> None:
    """Collect what has become litter since the last collections: cheap, however much this process holds.

    An answer of httpx is a cycle that holds its body.
    """
    gc.collect(1)


def give_back() -> None:
    """Give freed memory back to the system."""
    if hasattr(_c_library(), "malloc_trim"):
        _c_library().malloc_trim(0)


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
