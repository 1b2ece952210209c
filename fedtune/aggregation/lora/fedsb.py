"""`fedsb`: train an r×r core between two frozen factors. The mean update exactly, in r² numbers.

    both    A (r, d_in) with orthonormal rows, B (d_out, r) with orthonormal columns, frozen, from the plan's seed
    site    trains and sends R (r, r), which starts at zero, and the head
    server  R̄ = Σ pᵢ·Rᵢ
    exact   Σ pᵢ·B·Rᵢ·A = B·R̄·A

The tensor of layer L is `L.lora_R.weight`. Noise ξ_R reaches W as B·ξ_R·A, linear and of the norm of ξ_R, and r² is
far less than P. Such an adapter is a plain LoRA adapter (A, B·R) wherever it is used (`update`).

LoRA-SB starts from the SVD of the first full gradient, which is data: under DP that would be one more release. The
start here is public; `with_bases` takes other bases, of public records or of a release that was paid for.
Traffic: r² up, r² down. Sources: Fed-SB (arXiv 2502.15436), LoRA-SB (arXiv 2411.19557).
"""

# ruff: noqa: N806
# A, B and R are the matrices' names in the papers and in PEFT.

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedtune.aggregation.lora.draws import orthonormal
from fedtune.aggregation.lora.factors import Factors, State, only, rounded
from fedtune.aggregation.lora.linear import linear, union
from fedtune.aggregation.lora.protocol import (
    Algorithm,
    Exactness,
    Options,
    ServerState,
    SiteState,
    Traits,
)
from fedtune.model.layout import AdapterLayout, TensorSpec

TRAITS = Traits(
    source="arXiv 2502.15436",
    exactness=Exactness("exact", "Σ pᵢ·B·Rᵢ·A = B·R̄·A, the same A and B at all sites"),
    linear=True,
    noisy=frozenset({"R"}),
)


def fedsb(options: Options) -> Algorithm:
    """Return the algorithm: only the cores and the head are trained and travel."""
    algorithm = linear(
        "fedsb", TRAITS, lambda layout, _turn: cores(layout), lambda layout, _turn, _since: cores(layout)
    )
    start = algorithm.server.start
    site = replace(algorithm.site, start=lambda layout, initial: SiteState(started(layout, initial, options.seed)))
    server = replace(
        algorithm.server,
        start=lambda settings, layout, initial: start(settings, layout, started(layout, initial, options.seed)),
        update=update,
    )
    return replace(algorithm, site=site, server=server)


def core_name(layer: str) -> str:
    """Return the name of a layer's core."""
    return f"{layer}.lora_R.weight"


def cores(layout: AdapterLayout) -> AdapterLayout:
    """Return the layout of the cores (r, r) and the head."""
    specs = (TensorSpec(core_name(A.layer), (A.shape[0], B.shape[1]), "lora_R") for A, B in layout.pairs)
    return union(AdapterLayout(tuple(sorted(specs, key=lambda spec: spec.name))), only(layout, "head"))


def started(layout: AdapterLayout, initial: State, seed: int) -> State:
    """Return the start on every machine: seeded bases, zero cores, and the head of `initial`."""
    bases = {spec.name: orthonormal(spec, seed, "fedsb") for pair in layout.pairs for spec in pair}
    return with_bases(layout, {**initial, **bases})


def with_bases(layout: AdapterLayout, bases: State) -> State:
    """Return a start with the given A and B, and cores at zero."""
    shapes = {core_name(A.layer): (A.shape[0], B.shape[1]) for A, B in layout.pairs}
    return {**bases, **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()}}


def update(layout: AdapterLayout, state: ServerState) -> dict[str, Factors]:
    """Return (A, B·R) of each layer: what PEFT can hold."""
    found = {}
    for spec_A, spec_B in layout.pairs:
        A, B, R = (state.adapter[name] for name in (spec_A.name, spec_B.name, core_name(spec_A.layer)))
        found[spec_A.layer] = A, rounded(np.asarray(B, np.float64) @ np.asarray(R, np.float64), like=R)
    return found
