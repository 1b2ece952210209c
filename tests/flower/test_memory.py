from __future__ import annotations

import subprocess
import sys

CHILD = """
import collections, gc
from fedtune.flower import memory

class Cycle:
    def __init__(self, size):
        self.body, self.self = bytearray(size), self

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))

if {prepared}:
    memory.keep_large_blocks_apart()
ballast = [[number] for number in range(500_000)]  # what a process that has imported Flower holds
if {prepared}:
    memory.forget_the_start()
else:
    gc.collect()
before = resident()
under_way = collections.deque(maxlen=20)
for _ in range(600):
    under_way.append([Cycle(1_000_000), *(Cycle(1) for _ in range(100))])
print(resident() - before)
"""


def grown(*, prepared: bool) -> int:
    """Return by how many MB a process grows over 600 requests of 1 MB, 20 at a time, whose bodies hang in cycles."""
    words = [sys.executable, "-c", CHILD.format(prepared=prepared)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def test_bodies_in_cycles_are_given_back_soon_and_without_preparation_pile_up() -> None:
    assert grown(prepared=True) < 100 < grown(prepared=False)
