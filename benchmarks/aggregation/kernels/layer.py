"""The coordinator's CPU seconds for one layer of one round, by every rule: taking the replies in, then aggregating.

Beside them the dense way: form the mean product Σ pᵢ·Bᵢ·Aᵢ (side, side) in float32 and take its SVD.
"""

# ruff: noqa: N806
# A, B and M are the matrices' names in every LoRA paper.

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from benchmarks.aggregation.kernels.adapters import layout_of, random_state
from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.protocol import Algorithm, Turn
from fedtune.aggregation.lora.registry import get_algorithm
from fedtune.config.schema import AggregationSettings
from fedtune.model.layout import AdapterLayout


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Return seconds by rule (medians) and of the dense SVD, and how far flexlora's product is from the dense one's."""
    layout = layout_of(layers=1, side=settings["side"], rank=settings["rank"])
    seconds: dict[str, list[float]] = {name: [] for name in settings["algorithms"]}
    for _ in range(settings["repeats"]):
        for name, found in seconds.items():
            found.append(_round(get_algorithm(name), layout, settings["sites"]))
    dense, gap = _dense(layout, settings["sites"], settings["rank"])
    about = {name: settings[name] for name in ("side", "rank", "sites")}
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return about | {"seconds": medians, "dense_svd": dense, "largest_difference": gap}


def _round(algorithm: Algorithm, layout: AdapterLayout, sites: int) -> float:
    """Return the seconds of one round, all its exchanges; making the replies is not counted."""
    plan, spent = AggregationSettings(algorithm=algorithm.name), 0.0
    server = algorithm.server.start(plan, layout, random_state(layout, 0))
    for part in range(algorithm.traits.exchanges):
        turn = Turn(1, part)
        replies = [random_state(algorithm.up(layout, turn), 1 + site) for site in range(sites)]
        began = time.thread_time()
        collector = Collector(algorithm.averaged(layout, turn), algorithm.stacked(layout, turn))
        for site, reply in enumerate(replies):
            collector.add(f"{site:04d}", reply, 1 / sites)
        server = algorithm.server.receive(plan, layout, turn, server, collector.result())
        spent += time.thread_time() - began
        collector.close()
    return spent


def _dense(layout: AdapterLayout, sites: int, rank: int) -> tuple[float, float]:
    """Return the seconds of the dense way, and the relative distance of its product from flexlora's."""
    (spec_A, spec_B) = layout.pairs[0]
    replies = [random_state(layout, 1 + site) for site in range(sites)]
    began = time.thread_time()
    M = sum((1 / sites) * (reply[spec_B.name] @ reply[spec_A.name]) for reply in replies)
    left, singular, right = np.linalg.svd(np.asarray(M, np.float32), full_matrices=False)
    seconds = time.thread_time() - began
    nearest = left[:, :rank] * singular[:rank] @ right[:rank]
    found = _flexlora(layout, replies)
    return seconds, float(np.linalg.norm(nearest - found) / np.linalg.norm(nearest))


def _flexlora(layout: AdapterLayout, replies: list[dict[str, Any]]) -> Any:
    """Return the product of the factors that flexlora makes of the replies."""
    algorithm, plan, turn = get_algorithm("flexlora"), AggregationSettings(algorithm="flexlora"), Turn(1)
    collector = Collector(algorithm.averaged(layout, turn), algorithm.stacked(layout, turn))
    for site, reply in enumerate(replies):
        collector.add(f"{site:04d}", reply, 1.0)
    server = algorithm.server.start(plan, layout, replies[0])
    server = algorithm.server.receive(plan, layout, turn, server, collector.result())
    ((A, B),) = algorithm.server.update(layout, server).values()
    return B @ A
