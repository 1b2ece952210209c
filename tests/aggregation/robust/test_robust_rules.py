from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.aggregation.lora.ffa import without_A
from fedtune.aggregation.lora.stack import SpillingStack
from fedtune.aggregation.robust.clipping import clip_factors
from fedtune.aggregation.robust.rules import Blend, RobustRule, blended, product_blend, robust_state
from fedtune.aggregation.robust.traits import RULES
from fedtune.aggregation.robust.updates import EqualUpdates
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout
from tests.support.attacks import ATTACKS, little_z, scaled

State = dict[str, np.ndarray]
seeds = st.integers(0, 2**32 - 1)

BY_NAME = {name: RobustRule(name, 2) for name in RULES}
IN_PRODUCT_SPACE = [name for name, traits in RULES.items() if traits.product]
SITES = 11


@pytest.fixture(scope="module")
def sent(layout: AdapterLayout) -> AdapterLayout:
    """What `ffa` sends: ΔW is linear in it."""
    return without_A(layout)


def gap(flat: Callable, one: State, other: State) -> float:
    return float(np.linalg.norm(flat(one) - flat(other)))


def mean_of(states: list[State]) -> State:
    return {name: np.mean([state[name].astype(float) for state in states], axis=0) for name in states[0]}


@pytest.mark.parametrize("name", list(RULES))
@settings(max_examples=15)
@given(seed=seeds)
def test_a_permutation_of_the_sites_changes_nothing(
    name: str, seed: int, sent: AdapterLayout, make_state: Callable, make_sites: Callable, flat: Callable
) -> None:
    centre = make_state(sent, seed)
    states = make_sites(sent, centre, SITES, seed)
    order = np.random.default_rng(seed).permutation(SITES)
    straight = robust_state(BY_NAME[name], sent, EqualUpdates(states), centre)
    mixed = robust_state(BY_NAME[name], sent, EqualUpdates([states[i] for i in order]), centre)
    assert gap(flat, straight, mixed) < 1e-4


@pytest.mark.parametrize("name", list(RULES))
@settings(max_examples=15)
@given(seed=seeds)
def test_moving_everything_moves_the_result_along(
    name: str, seed: int, sent: AdapterLayout, make_state: Callable, make_sites: Callable
) -> None:
    centre, step = make_state(sent, seed), make_state(sent, seed + 1)
    states = make_sites(sent, centre, SITES, seed)
    straight = robust_state(BY_NAME[name], sent, EqualUpdates(states), centre)
    moved_states = [{key: state[key] + step[key] for key in state} for state in states]
    moved = robust_state(
        BY_NAME[name], sent, EqualUpdates(moved_states), {key: centre[key] + step[key] for key in centre}
    )
    for key in sent.names:
        np.testing.assert_allclose(moved[key], straight[key] + step[key], atol=1e-4)


@pytest.mark.parametrize(
    "rule",
    [
        RobustRule("trimmed_mean", 0),
        RobustRule("multi_krum", 0),
        RobustRule("bulyan", 0),
        RobustRule("norm_clip", 0, threshold=1e6),
    ],
    ids=lambda rule: rule.name,
)
def test_without_attackers_the_rule_is_the_mean(
    rule: RobustRule, sent: AdapterLayout, make_state: Callable, make_sites: Callable
) -> None:
    centre = make_state(sent, 0)
    states = make_sites(sent, centre, 6)
    result, mean = robust_state(rule, sent, EqualUpdates(states), centre), mean_of(states)
    for key in sent.names:
        np.testing.assert_allclose(result[key], mean[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_two_attackers_of_eleven_do_not_take_the_result_away(
    name: str, attack: str, sent: AdapterLayout, make_state: Callable, make_sites: Callable, flat: Callable
) -> None:
    centre = make_state(sent, 0)
    honest = make_sites(sent, centre, SITES)
    arrived = ATTACKS[attack](honest, centre, [0, 1])
    result = robust_state(BY_NAME[name], sent, EqualUpdates(arrived), centre)
    good = mean_of(honest[2:])
    spread = max(gap(flat, state, good) for state in honest)
    limit = spread if name != "norm_clip" else spread + 2 * 2 / SITES * gap(flat, good, centre)
    assert gap(flat, result, good) <= 1.05 * limit


def test_the_plain_mean_is_taken_over(
    sent: AdapterLayout, make_state: Callable, make_sites: Callable, flat: Callable
) -> None:
    # The control of the test above: without a rule the same attackers decide.
    centre = make_state(sent, 0)
    honest = make_sites(sent, centre, SITES)
    good = mean_of(honest[2:])
    spread = max(gap(flat, state, good) for state in honest)
    assert gap(flat, mean_of(scaled(honest, centre, [0, 1])), good) > 10 * spread


@pytest.mark.parametrize("name", list(RULES))
def test_an_attacker_may_grow_without_moving_the_result(
    name: str, sent: AdapterLayout, make_state: Callable, make_sites: Callable, flat: Callable
) -> None:
    centre = make_state(sent, 0)
    honest = make_sites(sent, centre, SITES)
    near, far = (
        robust_state(BY_NAME[name], sent, EqualUpdates(scaled(honest, centre, [0, 1], factor)), centre)
        for factor in (1e3, 1e30)
    )
    assert gap(flat, near, far) < 0.05 * gap(flat, mean_of(honest), centre)


@pytest.mark.parametrize("name", IN_PRODUCT_SPACE)
def test_in_product_space_too_the_attackers_are_left_out(
    name: str, layout: AdapterLayout, make_state: Callable, make_sites: Callable, updates: Callable
) -> None:
    centre = make_state(layout, 0)
    honest = make_sites(layout, centre, SITES)
    arrived = scaled(honest, centre, [3, 7])
    blend = product_blend(BY_NAME[name], layout, EqualUpdates(arrived), centre, scale=2.0)
    assert sum(blend.weights) + blend.rest == pytest.approx(1)
    assert max(blend.weights[3], blend.weights[7]) < 0.01
    everyone = np.mean([updates(layout, state)["h.0.wide"] for state in honest], axis=0)
    start = updates(layout, centre)["h.0.wide"]
    reached = updates(layout, blended(blend, layout, EqualUpdates(arrived), centre))["h.0.wide"]
    assert np.linalg.norm(reached - everyone) < 0.8 * np.linalg.norm(start - everyone)


def test_a_rule_on_frozen_a_decides_the_same_flat_and_in_product_space_when_a_is_orthonormal(
    make_layout: Callable, make_state: Callable, make_sites: Callable
) -> None:
    layout = make_layout({"a": (2, 6, 5)})
    centre = make_state(layout, 0)
    centre["a.lora_A.weight"] = np.linalg.qr(centre["a.lora_A.weight"].T)[0].T.astype(np.float32)
    frozen = {"a.lora_A.weight": centre["a.lora_A.weight"]}
    states = [{**state, **frozen} for state in make_sites(layout, centre, 7)]
    sent = without_A(layout)
    for name in IN_PRODUCT_SPACE:
        weights = product_blend(BY_NAME[name], layout, EqualUpdates(states), centre, scale=1.0)
        flat_result = robust_state(BY_NAME[name], sent, EqualUpdates(states), centre)
        product_result = blended(weights, layout, EqualUpdates(states), centre)
        expected = flat_result["a.lora_B.weight"] @ centre["a.lora_A.weight"]
        reached = product_result["a.lora_B.weight"] @ product_result["a.lora_A.weight"]
        np.testing.assert_allclose(reached, expected, atol=1e-5)


def test_the_blend_reaches_the_weighted_sum_of_products_when_the_rank_allows(
    make_layout: Callable, make_state: Callable, updates: Callable
) -> None:
    layout = make_layout({"a": (6, 6, 5)})
    centre, states = make_state(layout, 0), [make_state(layout, 1), make_state(layout, 2)]
    reached = updates(layout, blended(Blend((0.5, 0.2), 0.3), layout, EqualUpdates(states), centre))["a"]
    parts = [updates(layout, state)["a"] for state in (*states, centre)]
    np.testing.assert_allclose(reached, 0.5 * parts[0] + 0.2 * parts[1] + 0.3 * parts[2], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in RULES if name not in IN_PRODUCT_SPACE])
def test_a_rule_of_coordinates_is_refused_where_nobody_forms_them(
    name: str, layout: AdapterLayout, make_state: Callable, make_sites: Callable
) -> None:
    centre = make_state(layout, 0)
    with pytest.raises(AggregationError) as caught:
        product_blend(BY_NAME[name], layout, EqualUpdates(make_sites(layout, centre, SITES)), centre, scale=1.0)
    assert caught.value.code == "aggregation.needs-coordinates"
    assert "krum" in caught.value.hint


@pytest.mark.parametrize("name", list(RULES))
def test_no_rule_acts_on_the_entries_of_both_factors(
    name: str, layout: AdapterLayout, make_state: Callable, make_sites: Callable
) -> None:
    centre = make_state(layout, 0)
    with pytest.raises(AggregationError) as caught:
        robust_state(BY_NAME[name], layout, EqualUpdates(make_sites(layout, centre, SITES)), centre)
    assert caught.value.code == "aggregation.both-factors"


def test_krum_returns_one_sites_update_bit_for_bit(
    sent: AdapterLayout, make_state: Callable, make_sites: Callable
) -> None:
    centre = make_state(sent, 0)
    states = make_sites(sent, centre, SITES)
    result = robust_state(BY_NAME["krum"], sent, EqualUpdates(states), centre)
    assert any(all(result[key].tobytes() == state[key].tobytes() for key in sent.names) for state in states)


def test_clipping_shortens_long_updates_to_the_threshold_and_leaves_short_ones() -> None:
    np.testing.assert_allclose(clip_factors(np.array([0.0, 1.0, 2.0, 8.0]), 2.0), [1, 1, 1, 0.25])
    np.testing.assert_allclose(clip_factors(np.array([1.0, 2.0, 100.0])), [1, 1, 0.02])
    np.testing.assert_allclose(clip_factors(np.array([0.0, 0.0, 5.0])), [1, 1, 0])


def test_clipped_updates_are_added_to_the_last_global(
    sent: AdapterLayout, make_state: Callable, make_sites: Callable, flat: Callable
) -> None:
    centre = make_state(sent, 0)
    states = make_sites(sent, centre, 3)
    result = robust_state(RobustRule("norm_clip", 0, threshold=0.1), sent, EqualUpdates(states), centre)
    steps = [flat(state) - flat(centre) for state in states]
    expected = flat(centre) + np.mean([0.1 * step / np.linalg.norm(step) for step in steps], axis=0)
    np.testing.assert_allclose(flat(result), expected, atol=1e-6)


def test_unequal_weights_count_in_the_geometric_median(
    sent: AdapterLayout, make_state: Callable, make_sites: Callable, flat: Callable
) -> None:
    centre = make_state(sent, 0)
    states = make_sites(sent, centre, 3)
    stack = SpillingStack(most_bytes=1)  # all but nothing in memory: the rule reads the file back
    for site, weight in enumerate((6.0, 2.0, 2.0)):
        stack.add(f"site-{site}", states[site], weight)
    result = robust_state(RobustRule("geometric_median", 0), sent, stack, centre)
    stack.close()
    assert gap(flat, result, states[0]) < 1e-3  # a site with more than half of the weight is the median


def test_a_site_of_another_shape_is_refused(sent: AdapterLayout, make_state: Callable, make_sites: Callable) -> None:
    centre = make_state(sent, 0)
    states = make_sites(sent, centre, 3)
    states[1]["score.weight"] = states[1]["score.weight"][:1]
    with pytest.raises(AggregationError) as caught:
        robust_state(RobustRule("median", 1), sent, EqualUpdates(states), centre)
    assert caught.value.code == "aggregation.wrong-state"


def test_a_little_is_enough_uses_the_papers_z() -> None:
    assert little_z(50, 24) == pytest.approx(1.4261, abs=1e-4)  # Φ⁻¹(24 / 26)
    assert little_z(10, 0) == 0.0
