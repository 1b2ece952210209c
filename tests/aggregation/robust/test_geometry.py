# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.robust.geometry import flat_gram, layer_gram, product_gram, squared_distances
from fedtune.aggregation.robust.updates import EqualUpdates
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout

State = dict[str, np.ndarray]
seeds = st.integers(0, 2**32 - 1)


def dense_gram(
    updates: Callable, layout: AdapterLayout, states: list[State], centre: State, scale: float
) -> np.ndarray:
    """Inner products of dense ΔW − ΔW_global and of heads, by loops."""
    rows = []
    for state in states:
        layers, reference = updates(layout, state), updates(layout, centre)
        parts = [scale * (layers[layer] - reference[layer]).ravel() for layer in sorted(layers)]
        parts.append((state["score.weight"].astype(float) - centre["score.weight"]).ravel())
        rows.append(np.concatenate(parts))
    return np.array([[float(one @ other) for other in rows] for one in rows])


@given(seed=seeds, sites=st.integers(1, 5), scale=st.floats(0.1, 8))
def test_inner_products_of_products_equal_those_of_the_dense_updates(
    seed: int, sites: int, scale: float, layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    centre = make_state(layout, seed)
    states = [make_state(layout, seed + 1 + i) for i in range(sites)]
    expected = dense_gram(updates, layout, states, centre, scale)
    gram = product_gram(layout, EqualUpdates(states), centre, scale)
    np.testing.assert_allclose(gram, expected, atol=1e-10 * np.abs(expected).max())


def test_sites_may_have_ranks_of_their_own() -> None:
    generator = np.random.default_rng(0)
    pairs = [(generator.standard_normal((r, 7)), generator.standard_normal((5, r))) for r in (1, 3, 4, 2)]
    (A, B), others = pairs[-1], pairs[:-1]
    rows = [(own_B @ own_A - B @ A).ravel() for own_A, own_B in others]
    expected = np.array([[one @ other for other in rows] for one in rows])
    reached = layer_gram([own_A for own_A, _ in others], [own_B for _, own_B in others], A, B)
    np.testing.assert_allclose(reached, expected, atol=1e-12)


def test_every_invertible_mixing_is_the_same_update_in_product_space_and_another_one_flat(
    make_layout: Callable, make_state: Callable
) -> None:
    layout = make_layout({"a": (2, 6, 5)})
    centre, plain, mixed = make_state(layout, 0), make_state(layout, 1), make_state(layout, 1)
    mixing = np.array([[2.0, 1.0], [0.0, -4.0]])
    mixed["a.lora_A.weight"] = (mixing @ plain["a.lora_A.weight"]).astype(np.float32)
    mixed["a.lora_B.weight"] = (plain["a.lora_B.weight"] @ np.linalg.inv(mixing)).astype(np.float32)
    both = EqualUpdates([plain, mixed])
    apart = squared_distances(product_gram(layout, both, centre, 1.0))[0, 1]
    assert apart < 1e-10
    assert squared_distances(flat_gram(layout, both, centre))[0, 1] > 1  # the control: why flat A and B mean nothing


def test_a_short_update_of_a_long_adapter_keeps_its_length(make_layout: Callable, make_state: Callable) -> None:
    # ‖B·A‖ is 10⁸ times the update: from inner products of B·A itself nothing would be left of it.
    layout = make_layout({"a": (2, 6, 5)}, None)
    centre = {name: 1e3 * array.astype(float) for name, array in make_state(layout, 0).items()}
    step = np.random.default_rng(1).standard_normal((5, 2)) * 1e-5
    moved = {**centre, "a.lora_B.weight": centre["a.lora_B.weight"] + step}
    exact = (moved["a.lora_B.weight"] - centre["a.lora_B.weight"]) @ centre["a.lora_A.weight"]
    gram = product_gram(layout, EqualUpdates([moved]), centre, 1.0)
    assert gram[0, 0] == pytest.approx((exact**2).sum(), rel=1e-9)


@given(seed=seeds, size=st.integers(1, 4))
def test_distances_come_out_of_inner_products(seed: int, size: int, make_cloud: Callable, distances: Callable) -> None:
    rows = make_cloud(5, size, seed)
    np.testing.assert_allclose(squared_distances(rows @ rows.T), distances(rows), atol=1e-12)


def test_an_attacker_cannot_disturb_the_geometry_of_the_others(
    layout: AdapterLayout, make_state: Callable, make_sites: Callable
) -> None:
    centre = make_state(layout, 0)
    honest = make_sites(layout, centre, 3)
    huge = {name: np.full_like(array, 3e38) for name, array in centre.items()}
    alone = squared_distances(flat_gram(layout, EqualUpdates(honest), centre))
    beside = squared_distances(flat_gram(layout, EqualUpdates([*honest, huge]), centre))[:3, :3]
    np.testing.assert_allclose(beside, alone, rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["h.0.wide.lora_A.weight", "h.0.wide.lora_B.weight", "score.weight"])
def test_what_is_not_finite_is_refused(value: float, name: str, layout: AdapterLayout, make_state: Callable) -> None:
    centre, state = make_state(layout, 0), make_state(layout, 1)
    state[name].flat[2] = value
    for gram in (
        lambda: product_gram(layout, EqualUpdates([state]), centre, 1.0),
        lambda: flat_gram(layout, EqualUpdates([state]), centre),
    ):
        with pytest.raises(AggregationError) as caught:
            gram()
        assert caught.value.code == "aggregation.not-finite"
