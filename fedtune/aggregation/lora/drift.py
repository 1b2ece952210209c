"""What a study has added to W0 itself, as low-rank increments: the drift of the base, W0 + s·Σₜ Bₜ·Aₜ.

`flora` and `fedex` add one increment a round. The coordinator remembers each, (A (rₜ, d_in), B (d_out, rₜ)) for each
layer, and sends a site those it has not seen, joined to one pair: a site that missed rounds, or that starts late, ends
with the same base as the others. Joining is stacking, so it is exact; above rank min(d_out, d_in) the stack is
re-factored to that rank, which is exact up to rounding. The coordinator's memory grows by one increment a round.

A site adds s·B·A to its base weight in the base's own precision. A float32 base takes it to rounding; a quantised one
cannot, and keeps the increments as frozen adapters beside it instead. Knows no model and does not touch one.
"""

# ruff: noqa: N803, N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fedtune.aggregation.algebra import best_rank
from fedtune.aggregation.lora.factors import Factors, State, rounded_pair
from fedtune.errors import AggregationError, MessageError
from fedtune.model.layout import INCREMENT, AdapterLayout, TensorSpec

PREFIX: Final = INCREMENT


def remember(memory: State, number: int, increments: dict[str, Factors], layout: AdapterLayout) -> State:
    """Return the memory with round `number`'s increment of every layer; rank 0 is no increment."""
    added = dict(memory)
    for spec_A, spec_B in layout.pairs:
        A, B = increments[spec_A.layer]
        if A.shape[0]:
            added[f"{PREFIX}{number:06d}/{spec_A.name}"] = A
            added[f"{PREFIX}{number:06d}/{spec_B.name}"] = B
    return added


def after(layout: AdapterLayout, memory: State, since: int) -> dict[str, Factors]:
    """Return the joined increments of all rounds after `since`, by layer; without any, of rank 0."""
    rounds = sorted({int(name.split("/")[1]) for name in memory if name.startswith(PREFIX)})
    kept = [f"{PREFIX}{number:06d}/" for number in rounds if number > since]
    return {spec_A.layer: _joined(memory, kept, spec_A, spec_B) for spec_A, spec_B in layout.pairs}


def to_message(layout: AdapterLayout, memory: State, since: int) -> State:
    """Return what a site lacks as `drift/NAME`; nothing for a layer that has none."""
    joined, message = after(layout, memory, since), {}
    for spec_A, spec_B in layout.pairs:
        A, B = joined[spec_A.layer]
        if A.shape[0]:
            message[PREFIX + spec_A.name], message[PREFIX + spec_B.name] = A, B
    return message


def without(message: State) -> State:
    """Return what a message holds besides increments."""
    return {name: array for name, array in message.items() if not name.startswith(PREFIX)}


def from_message(layout: AdapterLayout, message: State) -> State:
    """Return a message's increments, checked: both factors or none, of one rank, finite, and no other layer's.

    Errors: `message.unknown-key`, `message.missing-key`, `message.wrong-shape`, `aggregation.not-finite`.
    """
    found = {name: array for name, array in message.items() if name.startswith(PREFIX)}
    known = {PREFIX + spec.name for pair in layout.pairs for spec in pair}
    if unknown := sorted(found.keys() - known):
        raise MessageError("unknown-key", f"tensor {unknown[0]!r:.80} is an increment of no adapted layer")
    for spec_A, spec_B in layout.pairs:
        _check(found, spec_A, spec_B)
    return found


def join(layout: AdapterLayout, held: State, message: State) -> State:
    """Return the increments that a site holds with those of a message: what its base has in all, `drift/NAME`."""
    found: dict[str, np.ndarray] = {}
    for spec_A, spec_B in layout.pairs:
        names = PREFIX + spec_A.name, PREFIX + spec_B.name
        pairs = [(state[names[0]], state[names[1]]) for state in (held, message) if names[0] in state]
        if pairs:
            found[names[0]], found[names[1]] = trimmed(*_stack(pairs))
    return found


def total(layout: AdapterLayout, memory: State, adapter: dict[str, Factors]) -> dict[str, Factors]:
    """Return the factors of drift and adapter together: all of W − W0, which a plain PEFT adapter can hold."""
    base = after(layout, memory, 0)
    return {layer: _stack([base[layer], pair]) for layer, pair in adapter.items()}


def _joined(memory: State, prefixes: Sequence[str], spec_A: TensorSpec, spec_B: TensorSpec) -> Factors:
    d_in, d_out = spec_A.shape[1], spec_B.shape[0]
    empty = np.zeros((0, d_in), np.float32), np.zeros((d_out, 0), np.float32)
    found = [(memory[p + spec_A.name], memory[p + spec_B.name]) for p in prefixes if p + spec_A.name in memory]
    return trimmed(*_stack(found)) if found else empty


def trimmed(A: np.ndarray, B: np.ndarray) -> Factors:
    """Return the same product at rank min(d_out, d_in) where the factors have more, else the factors themselves."""
    most = min(A.shape[1], B.shape[0])
    return (A, B) if A.shape[0] <= most else rounded_pair(best_rank([A], [B], [1.0], most), like=A)


def _stack(pairs: Sequence[Factors]) -> Factors:
    return np.concatenate([A for A, _ in pairs]), np.concatenate([B for _, B in pairs], axis=1)


def _check(found: State, spec_A: TensorSpec, spec_B: TensorSpec) -> None:
    A, B = found.get(PREFIX + spec_A.name), found.get(PREFIX + spec_B.name)
    if A is None and B is None:
        return
    if A is None or B is None:
        raise MessageError("missing-key", f"the increment of layer {spec_A.layer} has one factor of two")
    most = min(spec_A.shape[1], spec_B.shape[0])
    if A.ndim != 2 or A.shape[1] != spec_A.shape[1] or B.shape != (spec_B.shape[0], len(A)) or len(A) > most:  # noqa: PLR2004 - a matrix
        raise MessageError("wrong-shape", f"the increment of layer {spec_A.layer} has shapes {A.shape} and {B.shape}")
    if not (np.isfinite(A).all() and np.isfinite(B).all()):
        raise AggregationError("not-finite", f"the increment of layer {spec_A.layer} holds a NaN or an infinity")
