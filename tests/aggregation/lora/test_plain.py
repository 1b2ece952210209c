"""Any algorithm's state as one plain LoRA adapter: the same update in every layer, at one rank."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregation.lora.local_head import with_local_head
from fedtune.aggregation.lora.plain import plain_adapter
from fedtune.aggregation.lora.registry import ALGORITHMS, get_algorithm
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout
from tests.aggregation.lora.world import Site, dense, distance, layout_of, start

SHAPES = {"h.wide": (3, 11, 5), "h.tall": (3, 4, 9)}
COHORT = [Site(0.2), Site(0.3), Site(0.5)]
GLOBAL = [name for name in ALGORITHMS if get_algorithm(name).traits.releases]


def products(layout: AdapterLayout, adapter: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {A.layer: dense(adapter[A.name], adapter[B.name]) for A, B in layout.pairs}


@pytest.mark.parametrize("name", GLOBAL)
def test_it_is_what_the_algorithm_has_learnt_in_every_layer(name: str) -> None:
    world = start(get_algorithm(name), layout_of(SHAPES), COHORT)
    for number in range(3):
        world.round(number)
    adapter = plain_adapter(world.algorithm, world.layout, world.server)
    assert distance(products(world.layout, adapter), world.update()) <= 1e-6
    assert set(adapter) == set(world.layout.names)
    assert list(adapter) == sorted(adapter)
    assert all(array.dtype == np.float32 for array in adapter.values())
    assert np.array_equal(adapter["score.weight"], world.server.adapter["score.weight"])


@pytest.mark.parametrize("name", GLOBAL)
def test_all_layers_have_one_rank_and_never_less_than_the_plans(name: str) -> None:
    """PEFT has one rank a model; of layers whose sides are small the others' rank is padded with zeros."""
    world = start(get_algorithm(name), layout_of(SHAPES), COHORT)
    for number in range(3):
        world.round(number)
    adapter = plain_adapter(world.algorithm, world.layout, world.server)
    ranks = {adapter[A.name].shape[0] for A, _ in world.layout.pairs} | {
        adapter[B.name].shape[1] for _, B in world.layout.pairs
    }
    assert len(ranks) == 1
    (rank,) = ranks
    assert rank == 3 if name not in {"flora", "fedex"} else rank > 3


@pytest.mark.parametrize("name", ["fedit", "ffa", "rolora", "fedsvd", "flexlora", "hetlora", "fedask"])
def test_an_adapter_that_is_plain_already_comes_back_bit_for_bit(name: str) -> None:
    world = start(get_algorithm(name), layout_of(SHAPES), COHORT)
    world.round(1)
    adapter = plain_adapter(world.algorithm, world.layout, world.server)
    assert all(adapter[key].tobytes() == world.server.adapter[key].tobytes() for key in adapter)


def test_before_the_first_round_it_is_no_update_at_the_plans_rank() -> None:
    for name in GLOBAL:
        world = start(get_algorithm(name), layout_of(SHAPES), COHORT)
        adapter = plain_adapter(world.algorithm, world.layout, world.server)
        assert all(not np.any(product) for product in products(world.layout, adapter).values())
        assert {adapter[A.name].shape[0] for A, _ in world.layout.pairs} == {3}


@pytest.mark.parametrize(
    "algorithm", [get_algorithm("fedsa"), with_local_head(get_algorithm("fedit"))], ids=["fedsa", "head"]
)
def test_where_a_part_stays_at_the_sites_there_is_none(algorithm: object) -> None:
    world = start(algorithm, layout_of(SHAPES), COHORT)  # type: ignore[arg-type]
    world.round(1)
    with pytest.raises(AggregationError, match=r"aggregation\.no-global-adapter") as caught:
        plain_adapter(world.algorithm, world.layout, world.server)
    assert caught.value.hint
