"""`python -m benchmarks.dp_step.attention`: bfloat16 attention on a CPU, forward and backward, SDPA beside fedtune's.

The two take turns; medians of CPU time. No model: twelve heads of width 32 (MiniLM) on random queries, keys and values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SHAPES = ((128, 13), (128, 24), (64, 64), (16, 128), (4, 512))  # records, tokens


def main(arguments: list[str] | None = None) -> None:
    """Measure every shape and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dp_step.attention", description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| records | tokens | SDPA ms | fedtune ms | ratio |\n| ---: | ---: | ---: | ---: | ---: |")
    for records, tokens in SHAPES:
        plain, ours = measure(records, tokens, options.turns)
        print(f"| {records} | {tokens} | {plain:.1f} | {ours:.1f} | {ours / plain:.2f} |", flush=True)


def measure(records: int, tokens: int, turns: int) -> tuple[float, float]:
    """Return the median milliseconds of a forward and backward pass by SDPA and by fedtune's attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from fedtune.model.attention import attention

    torch.manual_seed(0)
    operands = [torch.randn(records, 12, tokens, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    mask = torch.ones(records, 1, tokens, tokens, dtype=torch.bool)
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for function, times in zip((sdpa_attention_forward, attention), taken, strict=True):
            began = time.process_time()
            _pass(function, operands, mask)
            if turn:
                times.append(1e3 * (time.process_time() - began))
    return statistics.median(taken[0]), statistics.median(taken[1])


def _pass(function: Any, operands: list[Tensor], mask: Tensor) -> None:
    layer = SimpleNamespace(is_causal=False, training=False)
    output, _ = function(layer, *operands, mask, dropout=0.0, scaling=32**-0.5)
    torch.autograd.grad(output, operands, torch.ones_like(output))


if __name__ == "__main__":
    main()
