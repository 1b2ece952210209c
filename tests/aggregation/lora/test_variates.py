"""SCAFFOLD's variates beside an algorithm: one for each trained tensor, both ways, and the algorithm as it was."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.protocol import Algorithm, ServerState, SiteState, Turn
from fedtune.aggregation.lora.registry import get_algorithm
from fedtune.aggregation.lora.variates import COMMON, OWN, variates_of, with_variates
from fedtune.aggregation.matrix import matrix
from fedtune.model.layout import AdapterLayout
from tests.aggregation.lora.world import PLAIN, initial, layout_of

LAYOUT = layout_of({"h.wide": (2, 7, 5), "h.tall": (2, 4, 9)})
ABLE = [row.name for row in matrix() if row.keeps_variates]
able = pytest.mark.parametrize("name", ABLE)
State = dict[str, np.ndarray]


def random(layout: AdapterLayout, seed: int, prefix: str = "") -> State:
    draw = np.random.default_rng(seed)
    return {prefix + spec.name: draw.standard_normal(spec.shape).astype(np.float32) for spec in layout.tensors}


def trained(algorithm: Algorithm, number: int = 1) -> AdapterLayout:
    return algorithm.site.trained(LAYOUT, Turn(number))


def round_of(
    algorithm: Algorithm, state: ServerState, weights: list[float], seed: int
) -> tuple[ServerState, list[State]]:
    """Run a round in which sites send what they like; return the next state and the variates' changes."""
    turn, changes = Turn(1), []
    collector = Collector(algorithm.averaged(LAYOUT, turn), algorithm.stacked(LAYOUT, turn))
    for at, weight in enumerate(weights):
        begun = algorithm.site.start(LAYOUT, initial(LAYOUT))
        received = algorithm.site.receive(LAYOUT, turn, begun, algorithm.server.send(LAYOUT, turn, state, 0))
        change = random(trained(algorithm), seed + at)
        moved = {**received.adapter, **random(trained(algorithm), 100 + seed + at)}
        memory = {**received.memory, **{COMMON + name: array for name, array in change.items()}}
        collector.add(f"site-{at}", algorithm.site.send(LAYOUT, turn, SiteState(moved, memory)), weight)
        changes.append(change)
    return algorithm.server.receive(PLAIN, LAYOUT, turn, state, collector.result()), changes


@able
def test_messages_hold_what_they_did_and_one_variate_of_each_trained_tensor(name: str) -> None:
    bare, algorithm = get_algorithm(name), with_variates(get_algorithm(name))
    state, turn = algorithm.server.start(PLAIN, LAYOUT, initial(LAYOUT)), Turn(1)
    beside = {COMMON + tensor for tensor in trained(bare).names}
    message = algorithm.server.send(LAYOUT, turn, state, 0)
    assert (
        message.keys()
        == bare.server.send(LAYOUT, turn, bare.server.start(PLAIN, LAYOUT, initial(LAYOUT)), 0).keys() | beside
    )
    assert set(algorithm.down(LAYOUT, turn, 0).names) == message.keys()
    received = algorithm.site.receive(LAYOUT, turn, algorithm.site.start(LAYOUT, initial(LAYOUT)), message)
    sent = algorithm.site.send(LAYOUT, turn, received)
    assert sent.keys() == set(bare.up(LAYOUT, turn).names) | beside
    announced = {spec.name: spec.shape for spec in algorithm.up(LAYOUT, turn).tensors}
    assert {tensor: array.shape for tensor, array in sent.items()} == announced


@able
def test_the_common_variate_starts_at_zero_and_moves_by_the_mean_change(name: str) -> None:
    algorithm = with_variates(get_algorithm(name))
    state = algorithm.server.start(PLAIN, LAYOUT, initial(LAYOUT))
    assert all(not np.any(array) for array in variates_of(state.memory, COMMON).values())
    first, changes = round_of(algorithm, state, [0.5, 0.3, 0.2], seed=1)
    second, more = round_of(algorithm, first, [0.5, 0.3, 0.2], seed=7)
    for tensor, found in variates_of(second.memory, COMMON).items():
        wanted = sum(
            weight * (one[tensor].astype(float) + other[tensor])
            for weight, one, other in zip([0.5, 0.3, 0.2], changes, more, strict=True)
        )
        assert np.allclose(found, wanted, atol=1e-6)


@able
def test_sites_that_stay_away_keep_their_part_of_it(name: str) -> None:
    """c stays Σ pᵢ·cᵢ over all sites: half of the weight moves it by half of the mean change."""
    algorithm = with_variates(get_algorithm(name))
    state = algorithm.server.start(PLAIN, LAYOUT, initial(LAYOUT))
    after, changes = round_of(algorithm, state, [0.3, 0.2], seed=1)
    for tensor, found in variates_of(after.memory, COMMON).items():
        assert np.allclose(found, 0.3 * changes[0][tensor].astype(float) + 0.2 * changes[1][tensor], atol=1e-6)


@able
def test_the_algorithm_itself_goes_on_as_without_them(name: str) -> None:
    """Bit for bit: adapter, optimiser and all that it keeps in memory of its own."""
    bare, algorithm = get_algorithm(name), with_variates(get_algorithm(name))
    state, plain = (one.server.start(PLAIN, LAYOUT, initial(LAYOUT)) for one in (algorithm, bare))
    collector = Collector(bare.averaged(LAYOUT, Turn(1)), bare.stacked(LAYOUT, Turn(1)))
    for at in range(2):
        moved = {**bare.site.start(LAYOUT, initial(LAYOUT)).adapter, **random(trained(bare), 101 + at)}
        collector.add(f"site-{at}", bare.site.send(LAYOUT, Turn(1), SiteState(moved)), 0.5)
    wanted = bare.server.receive(PLAIN, LAYOUT, Turn(1), plain, collector.result())
    found, _ = round_of(algorithm, state, [0.5, 0.5], seed=1)
    for tensor, array in wanted.adapter.items():
        assert found.adapter[tensor].tobytes() == array.tobytes()
    own = {key: array for key, array in found.memory.items() if not key.startswith(COMMON)}
    assert own.keys() == wanted.memory.keys()
    assert all(own[key].tobytes() == wanted.memory[key].tobytes() for key in own)


@able
def test_a_site_takes_the_variates_for_its_steps_and_not_for_its_adapter(name: str) -> None:
    algorithm = with_variates(get_algorithm(name))
    message = {**algorithm.server.send(LAYOUT, Turn(1), algorithm.server.start(PLAIN, LAYOUT, initial(LAYOUT)), 0)}
    message |= random(trained(algorithm), 3, COMMON)
    received = algorithm.site.receive(LAYOUT, Turn(1), algorithm.site.start(LAYOUT, initial(LAYOUT)), message)
    assert not [tensor for tensor in received.adapter if tensor.startswith((COMMON, OWN))]
    assert variates_of(received.memory, COMMON).keys() == set(trained(algorithm).names)


@able
def test_a_checkpoint_brings_them_back(name: str) -> None:
    algorithm = with_variates(get_algorithm(name))
    state, _ = round_of(algorithm, algorithm.server.start(PLAIN, LAYOUT, initial(LAYOUT)), [1.0], seed=2)
    again = ServerState.from_arrays(state.to_arrays())
    assert all(again.memory[key].tobytes() == array.tobytes() for key, array in state.memory.items())
