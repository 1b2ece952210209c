import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.algorithms import ALGORITHMS, get_algorithm
from fedtune.aggregation.mean import StreamingMean
from fedtune.aggregation.server_optimizers import OptimizerState
from fedtune.config.schema import AggregationSettings
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout

State = dict[str, np.ndarray]
shares = st.lists(st.floats(0.05, 20), min_size=1, max_size=5)
seeds = st.integers(0, 2**32 - 1)


def settings_for(algorithm: str, **overrides: object) -> AggregationSettings:
    return AggregationSettings(algorithm=algorithm, **overrides)


def site_states(algorithm: str, layout: AdapterLayout, start: State, count: int, seed: int) -> list[State]:
    """What each site holds after training: the trained tensors moved, the others as they came."""
    generator = np.random.default_rng(seed)
    trained = set(get_algorithm(algorithm).trained(layout).names)
    return [
        {
            name: start[name] + generator.standard_normal(start[name].shape).astype(np.float32) * (name in trained)
            for name in layout.names
        }
        for _ in range(count)
    ]


def mean_of(algorithm: str, layout: AdapterLayout, states: list[State], weights: list[float]) -> State:
    """The streaming mean of what the sites send."""
    upload = get_algorithm(algorithm).upload(layout)
    mean = StreamingMean(upload)
    for state, weight in zip(states, weights, strict=True):
        mean.add({name: state[name] for name in upload.names}, weight)
    return mean.result()


def one_round(
    settings: AggregationSettings, layout: AdapterLayout, start: State, states: list[State], weights: list[float]
) -> State:
    algorithm = get_algorithm(settings.algorithm)
    mean = mean_of(settings.algorithm, layout, states, weights)
    return algorithm.step(settings, layout, start, mean, algorithm.start(settings, layout, start))[0]


def target(updates: Callable[..., State], layout: AdapterLayout, states: list[State], weights: list[float]) -> State:
    """M = Σ pᵢ·Bᵢ·Aᵢ of each layer, in float64."""
    total = math.fsum(weights)
    dense = [updates(layout, state) for state in states]
    return {
        layer: sum(weight / total * update[layer] for weight, update in zip(weights, dense, strict=True))
        for layer in dense[0]
    }


def assert_updates_equal(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for layer in expected:
        np.testing.assert_allclose(actual[layer], expected[layer], rtol=0, atol=3e-6 * np.linalg.norm(expected[layer]))


@pytest.mark.parametrize("algorithm", ["ffa", "fedsvd"])
@given(weights=shares, seed=seeds)
def test_ffa_and_fedsvd_reach_the_mean_update_on_every_shape_and_weighting(
    algorithm: str, weights: list[float], seed: int, layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    start = make_state(layout, seed)
    states = site_states(algorithm, layout, start, len(weights), seed)
    after = one_round(settings_for(algorithm), layout, start, states, weights)
    assert_updates_equal(updates(layout, after), target(updates, layout, states, weights))


@given(weights=shares, seed=seeds)
def test_fedits_error_is_the_weighted_covariance_of_the_factors(
    weights: list[float], seed: int, layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    start = make_state(layout, seed)
    states = site_states("fedit", layout, start, len(weights), seed)
    after = one_round(settings_for("fedit"), layout, start, states, weights)
    reached, wanted = updates(layout, after), target(updates, layout, states, weights)
    total = math.fsum(weights)
    for spec_a, spec_b in layout.pairs:
        mean_a = sum(w / total * s[spec_a.name].astype(float) for w, s in zip(weights, states, strict=True))
        mean_b = sum(w / total * s[spec_b.name].astype(float) for w, s in zip(weights, states, strict=True))
        covariance = sum(
            w / total * (s[spec_b.name] - mean_b) @ (s[spec_a.name] - mean_a)
            for w, s in zip(weights, states, strict=True)
        )
        error = wanted[spec_a.layer] - reached[spec_a.layer]
        np.testing.assert_allclose(error, covariance, atol=1e-5 * (1 + np.linalg.norm(wanted[spec_a.layer])))


def test_fedit_misses_the_mean_update_when_the_sites_differ(
    layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    # The control for the exactness tests: they can fail.
    start = make_state(layout, 0)
    states = site_states("fedit", layout, start, 3, seed=1)
    after = updates(layout, one_round(settings_for("fedit"), layout, start, states, [1, 2, 3]))
    wanted = target(updates, layout, states, [1, 2, 3])
    assert all(np.linalg.norm(after[layer] - wanted[layer]) > 0.1 for layer in wanted)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_bug_1_of_fedit_every_site_moves_the_result_by_its_own_weight(
    algorithm: str, layout: AdapterLayout, make_state: Callable
) -> None:
    start = make_state(layout, 0)
    states = site_states(algorithm, layout, start, 3, seed=1)
    weights = [0.2, 0.3, 0.5]
    before = one_round(settings_for(algorithm), layout, start, states, weights)["score.weight"]
    for site, weight in enumerate(weights):
        moved = [dict(state) for state in states]
        moved[site]["score.weight"] = moved[site]["score.weight"] + np.float32(1)
        after = one_round(settings_for(algorithm), layout, start, moved, weights)["score.weight"]
        np.testing.assert_allclose(after - before, weight, atol=1e-6)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_bug_2_of_fedex_the_update_is_not_transposed_on_a_square_layer(
    algorithm: str, make_layout: Callable, make_state: Callable, updates: Callable
) -> None:
    # One site, so that fedit is exact too. A square layer hides a transposition from every shape check.
    layout = make_layout({"square": (2, 6, 6)})
    start = make_state(layout, 0)
    states = site_states(algorithm, layout, start, 1, seed=1)
    after = updates(layout, one_round(settings_for(algorithm), layout, start, states, [0.7]))["square"]
    wanted = updates(layout, states[0])["square"]
    np.testing.assert_allclose(after, wanted, atol=1e-5)
    assert np.abs(after - wanted.T).max() > 0.1


def test_bug_3_of_ffa_a_is_neither_trained_nor_sent_nor_returned_nor_changed(
    layout: AdapterLayout, make_state: Callable
) -> None:
    ffa = get_algorithm("ffa")
    for travels in (ffa.trained(layout), ffa.upload(layout), ffa.download(layout)):
        assert {spec.role for spec in travels.tensors} == {"lora_B", "head"}
    start = make_state(layout, 0)
    after = one_round(settings_for("ffa"), layout, start, site_states("ffa", layout, start, 2, seed=1), [1, 1])
    changed = {name for name in layout.names if after[name].tobytes() != start[name].tobytes()}
    assert changed == set(ffa.upload(layout).names)


def test_each_algorithm_sends_what_the_design_says(layout: AdapterLayout) -> None:
    everything, without_a = set(layout.names), set(layout.without("lora_A").names)
    travel = {
        name: (set(algorithm.upload(layout).names), set(algorithm.download(layout).names))
        for name, algorithm in ALGORITHMS.items()
    }
    assert travel == {
        "fedit": (everything, everything),
        "ffa": (without_a, without_a),
        "fedsvd": (without_a, everything),
    }


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_bug_7_the_update_of_equal_sites_survives_many_rounds_at_every_rank(
    algorithm: str, layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    # No factor of alpha / rank may slip in or out: if one did, fifty rounds would raise it to the fiftieth power.
    state = start = make_state(layout, 3)
    for _ in range(50):
        state = one_round(settings_for(algorithm), layout, state, [state] * 4, [1, 2, 3, 4])
    for layer, update in updates(layout, start).items():
        np.testing.assert_allclose(updates(layout, state)[layer], update, atol=1e-5)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_the_head_is_the_plain_weighted_mean(algorithm: str, layout: AdapterLayout, make_state: Callable) -> None:
    start = make_state(layout, 0)
    states = site_states(algorithm, layout, start, 2, seed=1)
    after = one_round(settings_for(algorithm), layout, start, states, [1, 3])
    expected = (states[0]["score.weight"].astype(float) + 3 * states[1]["score.weight"].astype(float)) / 4
    np.testing.assert_allclose(after["score.weight"], expected, rtol=1e-7, atol=1e-12)


def test_fedsvd_gives_a_orthonormal_rows_also_before_anything_was_learnt(
    make_layout: Callable, make_state: Callable
) -> None:
    layout = make_layout({"a": (3, 8, 5)})
    start = make_state(layout, 0)
    start["a.lora_B.weight"][:] = 0
    after = one_round(settings_for("fedsvd"), layout, start, [start], [1])
    rows = after["a.lora_A.weight"]
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-6)
    assert not after["a.lora_B.weight"].any()


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm"])
def test_fedsvd_moves_the_update_as_ffa_does_under_a_linear_server_optimizer(
    optimizer: str, layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    # Sites that add the same X·A to ΔW every round: the basis of B must not matter, momentum included.
    drift = {spec_b.layer: np.random.default_rng(9).standard_normal(spec_b.shape) for _, spec_b in layout.pairs}
    start = make_state(layout, 2)
    reached = {}
    for name in ("ffa", "fedsvd"):
        settings = settings_for(name, server_optimizer=optimizer, server_learning_rate=0.5, momentum=0.8)
        reached[name] = updates(layout, drifted(settings, layout, start, drift))
    assert_updates_equal(reached["fedsvd"], reached["ffa"])


def drifted(settings: AggregationSettings, layout: AdapterLayout, start: State, drift: State) -> State:
    """Six rounds in which every site adds `drift[layer]`·A₀ to ΔW, written in whatever basis A has by then."""
    algorithm = get_algorithm(settings.algorithm)
    state, memory = start, algorithm.start(settings, layout, start)
    for _ in range(6):
        mean = {name: state[name].astype(float) for name in algorithm.upload(layout).names}
        for spec_a, spec_b in layout.pairs:
            into_basis = start[spec_a.name].astype(float) @ np.linalg.pinv(state[spec_a.name].astype(float), rcond=1e-5)
            mean[spec_b.name] = mean[spec_b.name] + drift[spec_a.layer] @ into_basis
        mean = {name: array.astype(np.float32) for name, array in mean.items()}
        state, memory = algorithm.step(settings, layout, state, mean, memory)
    return state


def test_fedsvd_never_leaves_the_row_space_of_the_first_a(make_layout: Callable, make_state: Callable) -> None:
    layout = make_layout({"a": (3, 10, 7)})
    state = start = make_state(layout, 0)
    for turn in range(5):
        states = site_states("fedsvd", layout, state, 3, seed=turn)
        state = one_round(settings_for("fedsvd"), layout, state, states, [1, 2, 3])
    stacked = np.concatenate([start["a.lora_A.weight"], state["a.lora_A.weight"]])
    assert np.linalg.matrix_rank(stacked, tol=1e-4) == 3


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_a_step_changes_nothing_in_place_and_survives_a_checkpoint(
    algorithm: str, layout: AdapterLayout, make_state: Callable
) -> None:
    settings = settings_for(algorithm, server_optimizer="fedavgm")
    chosen = get_algorithm(algorithm)
    start, mean = make_state(layout, 0), make_state(chosen.upload(layout), 1)
    memory = chosen.start(settings, layout, start)
    before = [array.tobytes() for array in [*start.values(), *mean.values(), *memory.moments.values()]]
    state, memory_after = chosen.step(settings, layout, start, mean, memory)
    assert [array.tobytes() for array in [*start.values(), *mean.values(), *memory.moments.values()]] == before
    straight, _ = chosen.step(settings, layout, state, mean, memory_after)
    resumed, _ = chosen.step(settings, layout, state, mean, OptimizerState.from_arrays(memory_after.to_arrays()))
    assert list(straight) == list(layout.names)
    for name in layout.names:
        assert straight[name].tobytes() == resumed[name].tobytes()
        assert straight[name].dtype == np.float32


def test_an_unknown_algorithm_names_those_there_are() -> None:
    with pytest.raises(AggregationError) as caught:
        get_algorithm("fedsv")
    assert caught.value.code == "aggregation.unknown-algorithm"
    assert all(name in caught.value.hint for name in ALGORITHMS)
