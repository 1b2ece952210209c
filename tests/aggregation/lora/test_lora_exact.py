"""The rules that promise the mean update reach it, on every shape, weighting, rank and number format."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.aggregation.lora.gather import Collector, Gathered
from fedtune.aggregation.lora.protocol import Algorithm, Options, Turn
from fedtune.aggregation.lora.registry import ALGORITHMS, get_algorithm
from fedtune.model.layout import AdapterLayout
from tests.aggregation.lora import world as world_module
from tests.aggregation.lora.world import Site, State, dense, distance, layout_of, mean_of, start

EXACT = [name for name in ALGORITHMS if get_algorithm(name).traits.exactness.kind in {"exact", "almost surely"}]
GLOBAL = [name for name in ALGORITHMS if get_algorithm(name).traits.releases]
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-6, "float64": 1e-12}

sides = st.integers(4, 12)
layers = st.fixed_dictionaries(
    {
        "h.wide": st.tuples(st.integers(1, 4), sides, sides),
        "h.square": st.integers(4, 9).map(lambda side: (2, side, side)),
        "emb": st.tuples(st.integers(1, 3), st.integers(20, 30), sides),
    }
)
weights = st.lists(st.floats(0.05, 20), min_size=1, max_size=5)
seeds = st.integers(0, 2**32 - 1)
forms = st.sampled_from(sorted(TOLERANCE))


def test_the_rules_that_promise_exactness_are_these() -> None:
    assert EXACT == ["ffa", "rolora", "fedsvd", "flora", "fedex", "fedsb", "fedask"]


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=40)
@given(
    shapes=layers, weights=weights, ranks=st.lists(st.integers(1, 5), min_size=5, max_size=5), form=forms, seed=seeds
)
def test_the_new_global_update_is_the_mean_update(
    name: str, shapes: dict[str, tuple[int, int, int]], weights: list[float], ranks: list[int], form: str, seed: int
) -> None:
    sites = [Site(weight, rank, form=form) for weight, rank in zip(weights, ranks, strict=False)]
    world = start(get_algorithm(name, Options(seed=seed)), layout_of(shapes), sites)
    for turn in range(3):
        before = world.base()
        wanted = world.round(seed + turn)
        reached = world.update()
        assert distance({layer: reached[layer] - before[layer] for layer in wanted}, wanted) <= TOLERANCE[form]
        assert world.server.adapter["score.weight"] == pytest.approx(
            mean_of([dict(s.adapter)["score.weight"] for s in world.trained], shares_of(weights)), rel=1e-6, abs=1e-6
        )


def over_the_wire(
    algorithm: Algorithm, layout: AdapterLayout, turn: Turn, replies: list[State], weights: list[float]
) -> Gathered:
    """Gather as the coordinator does: the streaming mean, and a stack of which most is on disk."""
    collector = Collector(algorithm.averaged(layout, turn), algorithm.stacked(layout, turn), most_bytes=500)
    for site in reversed(range(len(replies))):
        collector.add(f"{site:03d}", replies[site], weights[site])
    return collector.result()


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=layers, weights=weights, ranks=st.lists(st.integers(1, 5), min_size=5, max_size=5), seed=seeds)
def test_the_new_global_update_is_the_mean_update_also_through_the_streaming_mean_and_the_disk(
    name: str,
    shapes: dict[str, tuple[int, int, int]],
    weights: list[float],
    ranks: list[int],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(world_module, "gather", over_the_wire)
    sites = [Site(weight, rank) for weight, rank in zip(weights, ranks, strict=False)]
    world = start(get_algorithm(name, Options(seed=seed)), layout_of(shapes), sites)
    for turn in range(2):
        before, wanted = world.base(), world.round(seed + turn)
        reached = world.update()
        assert distance({layer: reached[layer] - before[layer] for layer in wanted}, wanted) <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("form", sorted(TOLERANCE))
def test_when_no_site_has_moved_in_the_first_round_the_update_is_zero(name: str, form: str) -> None:
    sites = [Site(1.0, 2, moves=0.0, form=form), Site(3.0, 4, moves=0.0, form=form)]
    world = start(get_algorithm(name), layout_of({"h": (3, 7, 11), "emb": (2, 21, 4)}), sites)
    assert not any(np.any(update) for update in world.round(0).values())
    assert not any(np.any(update) for update in world.update().values())


@pytest.mark.parametrize("name", EXACT)
def test_an_update_of_zero_changes_nothing(name: str) -> None:
    world = start(get_algorithm(name), layout_of({"h": (3, 7, 11), "emb": (2, 21, 4)}), [Site(1.0, 2), Site(3.0, 4)])
    world.round(1)
    after_one = world.update()
    world.sites = [Site(1.0, 2, moves=0.0), Site(3.0, 4, moves=0.0)]
    for turn in range(3):
        world.round(turn)
        assert distance(world.update(), after_one) <= 1e-6


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("form", sorted(TOLERANCE))
def test_with_one_site_every_rule_reaches_that_sites_update(name: str, form: str) -> None:
    algorithm = get_algorithm(name, Options(train_both=True))
    world = start(algorithm, layout_of({"h": (3, 9, 7), "sq": (4, 8, 8)}), [Site(0.3, rank=2, form=form)])
    for turn in range(4):
        before = world.base()
        wanted = world.round(turn)
        reached = world.update()
        assert distance({layer: reached[layer] - before[layer] for layer in wanted}, wanted) <= TOLERANCE[form]


@pytest.mark.parametrize("name", ["fedit", "hetlora"])
def test_the_inexact_rules_miss_it_so_the_tests_above_can_fail(name: str) -> None:
    world = start(get_algorithm(name), layout_of({"h": (3, 9, 7)}), [Site(1.0), Site(2.0), Site(3.0)])
    wanted = world.round(0)
    assert distance(world.update(), wanted) > 0.1


@settings(max_examples=40)
@given(
    shapes=layers, weights=weights, seed=seeds, ranks=st.lists(st.integers(1, 5), min_size=5, max_size=5), form=forms
)
def test_flexlora_is_the_nearest_matrix_of_its_rank_to_the_dense_mean_update(
    shapes: dict[str, tuple[int, int, int]], weights: list[float], seed: int, ranks: list[int], form: str
) -> None:
    sites = [Site(weight, rank, form=form) for weight, rank in zip(weights, ranks, strict=False)]
    world = start(get_algorithm("flexlora"), layout_of(shapes), sites)
    wanted, reached = world.round(seed), world.update()
    for layer, (rank, _, _) in shapes.items():
        tail = np.linalg.svd(wanted[layer], compute_uv=False)[rank:]
        assert np.linalg.norm(wanted[layer] - reached[layer]) == pytest.approx(
            math.sqrt(math.fsum(tail**2)), rel=TOLERANCE[form], abs=TOLERANCE[form] * np.linalg.norm(wanted[layer])
        )


@pytest.mark.parametrize("own_rank", [1, 2, 3])
def test_flexlora_gives_a_site_of_small_rank_the_nearest_matrix_of_that_rank(own_rank: int) -> None:
    world = start(get_algorithm("flexlora"), layout_of({"h": (5, 9, 7)}), [Site(1.0, own_rank), Site(2.0, 4)])
    wanted = world.round(0)["h"]
    world.number += 1
    state = world.fetch(0)
    found = dense(state.adapter["h.lora_A.weight"], state.adapter["h.lora_B.weight"])
    left, singular, right = np.linalg.svd(wanted)
    np.testing.assert_allclose(found, left[:, :own_rank] * singular[:own_rank] @ right[:own_rank], atol=1e-5)


def test_flexlora_is_exact_where_the_plans_rank_holds_all_sites_ranks() -> None:
    world = start(get_algorithm("flexlora"), layout_of({"h": (6, 9, 12)}), [Site(1.0, 1), Site(2.0, 3), Site(0.5, 2)])
    for turn in range(3):
        wanted = world.round(turn)
        assert distance(world.update(), wanted) <= 1e-6


def shares_of(weights: list[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
