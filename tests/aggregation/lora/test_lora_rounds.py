"""What holds for every algorithm over rounds: who changes what, what travels, what a missed round or a restart does."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.aggregation.lora import drift
from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.local_head import with_local_head
from fedtune.aggregation.lora.protocol import Options, ServerState, SiteState, Turn
from fedtune.aggregation.lora.registry import ALGORITHMS, get_algorithm
from fedtune.errors import AggregationError, MessageError
from tests.aggregation.lora.world import PLAIN, Site, distance, initial, layout_of, site_products, start

SHAPES = {"emb": (2, 21, 4), "h.square": (3, 6, 6), "h.wide": (3, 11, 5)}
LAYOUT = layout_of(SHAPES)
COHORT = [Site(0.2, 2), Site(0.3, 3), Site(0.5, 1)]
STACKED = [name for name in ALGORITHMS if not get_algorithm(name).traits.linear]
GLOBAL = [name for name in ALGORITHMS if get_algorithm(name).traits.releases]
every = pytest.mark.parametrize("name", list(ALGORITHMS))

# Which tensors travel in rounds 2 and 3 (for a site that was there): up and down, by what their names hold.
TRAVEL = {
    "fedit": ("A B head", "A B head", "A B head", "A B head"),
    "ffa": ("B head", "B head", "B head", "B head"),
    "rolora": ("A head", "B head", "B head", "A head"),
    "fedsvd": ("B head", "A B head", "B head", "A B head"),
    "fedsa": ("A head", "A head", "A head", "A head"),
    "flora": ("A B head", "head", "A B head", "head"),
    "fedex": ("A B head", "A B head", "A B head", "A B head"),
    "flexlora": ("A B head", "A B head", "A B head", "A B head"),
    "hetlora": ("A B head", "A B head", "A B head", "A B head"),
    "fedsb": ("R head", "R head", "R head", "R head"),
    "fedask": ("sketch", "A B head", "sketch", "A B head"),
}


def bits(state: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state.items()}


def kinds(names: tuple[str, ...]) -> str:
    marks = {"lora_A": "A", "_A": "A", "lora_B": "B", "_B": "B", "lora_R": "R", "score": "head", "sketch": "sketch"}
    return " ".join(sorted({kind for name in names for mark, kind in marks.items() if mark in name}))


@every
def test_a_site_changes_what_the_algorithm_trains_and_nothing_else(name: str) -> None:
    world = start(get_algorithm(name), LAYOUT, COHORT)
    for number in (1, 2, 3):
        world.number = number
        received = world.fetch(1)
        after = world.train(1, received, seed=number)
        changed = {key for key in after.adapter if bits(after.adapter)[key] != bits(received.adapter)[key]}
        assert changed == set(world.algorithm.site.trained(world.layout_of(1), Turn(number)).names)
        assert changed


@every
def test_a_site_sends_and_receives_what_the_table_says_in_the_shapes_that_are_announced(name: str) -> None:
    world = start(get_algorithm(name), LAYOUT, COHORT)
    world.round(1)
    for number, (up, down) in zip((2, 3), (TRAVEL[name][:2], TRAVEL[name][2:]), strict=True):
        turn, layout = Turn(number), world.layout_of(1)
        message = drift.without(world.algorithm.server.send(layout, turn, world.server, number - 2))
        announced = world.algorithm.down(layout, turn, number - 2)
        assert {key: array.shape for key, array in message.items()} == {s.name: s.shape for s in announced.tensors}
        assert kinds(announced.names) == down
        world.number = number
        state = world.train(1, world.fetch(1), seed=number)
        sent = world.algorithm.site.send(layout, turn, state)
        announced = world.algorithm.up(layout, turn)
        assert {key: array.shape for key, array in sent.items()} == {s.name: s.shape for s in announced.tensors}
        assert kinds(announced.names) == up
        world.number = number - 1
        world.since[1] = number - 2
        world.round(number)


@pytest.mark.parametrize("name", [name for name in GLOBAL if name not in {"flexlora", "hetlora"}])
def test_a_site_that_missed_rounds_starts_from_the_coordinators_model_all_the_same(name: str) -> None:
    world = start(get_algorithm(name), LAYOUT, COHORT)
    fetch, checked = world.fetch, []

    def fetch_and_compare(at: int) -> SiteState:
        state = fetch(at)
        products = site_products(world.layout_of(at), dict(state.adapter))
        held = {layer: world.bases[at][layer] + products[layer] for layer in products}
        checked.append(distance(held, world.update()))
        return state

    world.fetch = fetch_and_compare
    for turn, present in enumerate([[0, 1], [0], [0, 1], [1], [0, 1, 2], [2], [0, 2], [1], [0, 1, 2]]):
        world.round(turn, present)
    assert len(checked) == 16
    assert max(checked) <= 1e-5


def test_a_flora_round_starts_from_a_fresh_pair_that_all_machines_draw_alike() -> None:
    drawn = []
    for seed, number in ((0, 1), (0, 2), (1, 1)):
        algorithm = get_algorithm("flora", Options(seed=seed))
        states = [
            algorithm.site.receive(LAYOUT, Turn(number), algorithm.site.start(LAYOUT, initial(LAYOUT)), {})
            for _ in range(2)
        ]
        assert bits(states[0].adapter) == bits(states[1].adapter)
        assert not any(np.any(states[0].adapter[B.name]) for _, B in LAYOUT.pairs)
        drawn += [states[0].adapter[A.name].tobytes() for A, _ in LAYOUT.pairs]
    assert len(set(drawn)) == 9


@every
def test_a_round_that_was_trained_and_never_counted_leaves_nothing_at_the_site_but_what_it_keeps(name: str) -> None:
    algorithm = get_algorithm(name)
    world = start(algorithm, LAYOUT, COHORT)
    world.round(1)
    world.number = 2
    received = world.fetch(0)
    trained = world.train(0, received, seed=5)
    layout = world.layout_of(0)
    kept = set(algorithm.site.kept(layout).names)
    carried = algorithm.carried(layout, received, trained)
    changed = {key for key in carried.adapter if bits(carried.adapter)[key] != bits(received.adapter)[key]}
    assert changed == kept
    assert kept == ({spec_b.name for _, spec_b in layout.pairs} if name == "fedsa" else set())


@every
def test_nothing_is_changed_in_place_and_a_checkpoint_resumes_to_the_same_bits(name: str) -> None:
    world = start(get_algorithm(name), LAYOUT, COHORT)
    for turn in range(2):
        before, frozen = world.server, bits(world.server.to_arrays())
        world.round(turn)
        assert bits(before.to_arrays()) == frozen
    resumed = start(get_algorithm(name), LAYOUT, COHORT)
    resumed.server = ServerState.from_arrays(world.server.to_arrays())
    resumed.held, resumed.since, resumed.number, resumed.bases = (
        world.held,
        list(world.since),
        world.number,
        world.bases,
    )
    world.held, world.bases = list(world.held), [dict(base) for base in world.bases]
    world.round(7)
    resumed.round(7)
    assert bits(world.server.to_arrays()) == bits(resumed.server.to_arrays())


def test_a_coordinators_state_of_another_form_is_refused() -> None:
    with pytest.raises(AggregationError) as caught:
        ServerState.from_arrays({"optimiser/step": np.array([1])})
    assert caught.value.code == "aggregation.broken-state"


@every
@settings(max_examples=10)
@given(order=st.permutations(range(3)))
def test_the_order_of_the_replies_changes_no_bit(name: str, order: list[int]) -> None:
    results = []
    for arrival in ([0, 1, 2], order):
        algorithm = get_algorithm(name)
        world = start(algorithm, LAYOUT, COHORT)
        world.number, turn = 1, Turn(1)
        collector = Collector(algorithm.averaged(LAYOUT, turn), algorithm.stacked(LAYOUT, turn))
        for at in arrival:
            state = world.train(at, world.fetch(at), seed=at)
            collector.add(f"site-{at}", algorithm.site.send(world.layout_of(at), turn, state), COHORT[at].weight)
        server = algorithm.server.receive(PLAIN, LAYOUT, turn, world.server, collector.result())
        results.append(bits(server.to_arrays()))
    assert results[0] == results[1]


@every
def test_the_wires_streaming_mean_and_stack_give_what_the_plain_mean_gives(name: str, tmp_path: Path) -> None:
    # Everything that is stacked goes to disk here.
    algorithm = get_algorithm(name)
    world, wire = (start(algorithm, LAYOUT, COHORT) for _ in range(2))
    world.round(3)
    wire.number = 1
    states = {at: wire.train(at, wire.fetch(at), 3 + 1000 * at) for at in range(3)}
    for part in range(algorithm.traits.exchanges):
        turn = Turn(1, part)
        collector = Collector(
            algorithm.averaged(LAYOUT, turn), algorithm.stacked(LAYOUT, turn), most_bytes=0, folder=tmp_path
        )
        for at, trained in states.items():
            layout, held = wire.layout_of(at), trained
            if part:
                held = algorithm.site.receive(layout, turn, held, algorithm.server.send(layout, turn, wire.server, 0))
            collector.add(str(at), algorithm.site.send(layout, turn, held), COHORT[at].weight)
        wire.server = algorithm.server.receive(PLAIN, LAYOUT, turn, wire.server, collector.result())
    for key, array in world.server.to_arrays().items():
        np.testing.assert_allclose(wire.server.to_arrays()[key], array, rtol=1e-4, atol=1e-5)


def test_rolora_keeps_the_momentum_of_the_factor_that_rests() -> None:
    world = start(get_algorithm("rolora"), LAYOUT, COHORT, server_optimizer="fedavgm")
    world.round(1)
    resting = bits(dict(world.server.optimizer.moments))
    world.round(2)
    after = bits(dict(world.server.optimizer.moments))
    changed = {key for key in after if after[key] != resting[key]}
    assert after.keys() == resting.keys()
    assert kinds(tuple(changed)) == "A head"


@pytest.mark.parametrize("name", [*STACKED, "fedask"])
@pytest.mark.parametrize("changes", [{"server_optimizer": "fedavgm"}, {"server_learning_rate": 0.5}])
def test_rules_that_make_new_factors_refuse_a_server_optimizer_before_the_first_round(
    name: str, changes: dict[str, object]
) -> None:
    with pytest.raises(AggregationError) as caught:
        start(get_algorithm(name), LAYOUT, COHORT, **changes)
    assert caught.value.code == "aggregation.optimizer-with-stack"
    assert "fedavg" in caught.value.hint


@every
def test_a_local_head_is_trained_kept_and_in_no_message(name: str) -> None:
    world = start(with_local_head(get_algorithm(name)), LAYOUT, COHORT)
    begin = world.server.adapter["score.weight"].copy()
    own = None
    for turn in range(3):
        world.round(turn)
        own = [state.adapter["score.weight"] for state in world.trained]
        assert all(np.array_equal(held.adapter["score.weight"], one) for held, one in zip(world.held, own, strict=True))
    np.testing.assert_array_equal(world.server.adapter["score.weight"], begin)
    assert len({one.tobytes() for one in own}) == 3
    for part in range(world.algorithm.traits.exchanges):
        turn = Turn(4, part)
        for travels in (world.algorithm.up(LAYOUT, turn), world.algorithm.down(LAYOUT, turn, 3)):
            assert "score.weight" not in travels.names
    world.number = 4
    state = world.train(1, world.fetch(1), seed=4)
    down = world.algorithm.server.send(world.layout_of(1), Turn(4), world.server, 0)
    up = world.algorithm.site.send(world.layout_of(1), Turn(4), state)
    assert "score.weight" in state.adapter
    assert "score.weight" not in {**down, **up}


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_increments_are_never_of_a_rank_above_the_layers_sides_and_lose_nothing_by_that(name: str) -> None:
    layout = layout_of({"h": (3, 4, 5)})
    world = start(get_algorithm(name), layout, [Site(1.0)] * 6)
    for turn in range(3):
        before, wanted = world.base(), world.round(turn)
        assert distance({"h": world.update()["h"] - before["h"]}, wanted) <= 1e-6
        assert drift.after(layout, world.server.memory, 0)["h"][0].shape == (4, 4)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"drift/h.lora_A.weight": None}, "message.missing-key"),
        ({"drift/other.lora_A.weight": np.zeros((1, 4), np.float32)}, "message.unknown-key"),
        ({"drift/h.lora_A.weight": np.zeros((1, 7), np.float32)}, "message.wrong-shape"),
        ({"drift/h.lora_A.weight": np.zeros((2, 4), np.float32)}, "message.wrong-shape"),
        ({"drift/h.lora_A.weight": np.zeros(4, np.float32)}, "message.wrong-shape"),
        ({"drift/h.lora_B.weight": np.full((5, 1), np.nan, np.float32)}, "aggregation.not-finite"),
        (
            {
                "drift/h.lora_A.weight": np.zeros((9, 4), np.float32),
                "drift/h.lora_B.weight": np.zeros((5, 9), np.float32),
            },
            "message.wrong-shape",
        ),
    ],
)
def test_a_site_refuses_increments_that_no_base_of_its_could_take(change: dict[str, object], code: str) -> None:
    layout = layout_of({"h": (3, 4, 5)})
    good = {"drift/h.lora_A.weight": np.ones((1, 4), np.float32), "drift/h.lora_B.weight": np.ones((5, 1), np.float32)}
    assert drift.from_message(layout, good).keys() == good.keys()
    bad = {key: array for key, array in {**good, **change}.items() if array is not None}
    with pytest.raises((MessageError, AggregationError)) as caught:
        drift.from_message(layout, bad)
    assert caught.value.code == code


def test_an_unknown_algorithm_names_those_there_are() -> None:
    with pytest.raises(AggregationError) as caught:
        get_algorithm("fedsv")
    assert caught.value.code == "aggregation.unknown-algorithm"
    assert all(name in caught.value.hint for name in ALGORITHMS)


@every
def test_the_traits_agree_with_what_the_algorithm_does(name: str) -> None:
    algorithm = get_algorithm(name)
    turns = [Turn(number, part) for number in (1, 2) for part in range(algorithm.traits.exchanges)]
    assert algorithm.traits.linear == (not any(algorithm.stacked(LAYOUT, turn).tensors for turn in turns))
    together = max(
        len(kinds(algorithm.site.trained(LAYOUT, turn).names).replace(" head", "").split()) for turn in turns
    )
    assert algorithm.traits.noise_multiplies == (together > 1)
    assert algorithm.traits.adapters_held(10) == (1 if algorithm.traits.linear else 10)
    assert math.isfinite(algorithm.up(LAYOUT, turns[0]).size)
