from collections.abc import Callable

import numpy as np
import pytest

from fedtune.aggregation.averaging import TailAverage
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.protocol import Turn
from fedtune.aggregation.lora.registry import get_algorithm
from fedtune.aggregation.lora.stack import SpillingStack
from fedtune.config.schema import AggregationSettings
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout

State = dict[str, np.ndarray]


def history(algorithm: str, layout: AdapterLayout, start: State, rounds: int) -> list[State]:
    """The global adapters of a study whose sites move at random."""
    settings, chosen = AggregationSettings(algorithm=algorithm), get_algorithm(algorithm)
    generator, states = np.random.default_rng(3), []
    state = chosen.server.start(settings, layout, start)
    for number in range(1, rounds + 1):
        mean = {
            spec.name: state.adapter[spec.name] + 0.3 * generator.standard_normal(spec.shape).astype(np.float32)
            for spec in chosen.up(layout, Turn(number)).tensors
        }
        mean = {name: array.astype(np.float32) for name, array in mean.items()}
        state = chosen.server.receive(settings, layout, Turn(number), state, Gathered(mean, SpillingStack()))
        states.append(dict(state.adapter))
    return states


def averaged(layout: AdapterLayout, states: list[State], last: int) -> State:
    average = TailAverage(layout, last)
    for state in states:
        average.push(state)
    return average.result()


def mean_update(updates: Callable[..., State], layout: AdapterLayout, states: list[State]) -> State:
    dense = [updates(layout, state) for state in states]
    return {layer: np.mean([update[layer] for update in dense], axis=0) for layer in dense[0]}


@pytest.mark.parametrize("algorithm", ["ffa", "fedsvd"])
def test_the_average_of_ffa_and_fedsvd_is_the_mean_of_the_last_updates(
    algorithm: str, layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    states = history(algorithm, layout, make_state(layout, 0), rounds=6)
    reached = updates(layout, averaged(layout, states, last=4))
    for layer, wanted in mean_update(updates, layout, states[-4:]).items():
        np.testing.assert_allclose(reached[layer], wanted, atol=5e-6 * np.linalg.norm(wanted))


def test_the_average_of_ffa_keeps_the_frozen_a_bit_for_bit(layout: AdapterLayout, make_state: Callable) -> None:
    start = make_state(layout, 0)
    average = averaged(layout, history("ffa", layout, start, rounds=3), last=3)
    for spec_a, _ in layout.pairs:
        assert average[spec_a.name].tobytes() == start[spec_a.name].tobytes()


def test_the_average_of_fedit_is_the_best_approximation_of_its_rank(
    layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    states = history("fedit", layout, make_state(layout, 0), rounds=3)
    reached = updates(layout, averaged(layout, states, last=3))
    for spec_a, _ in layout.pairs:
        wanted = mean_update(updates, layout, states)[spec_a.layer]
        cut = np.linalg.svd(wanted, compute_uv=False)[spec_a.shape[0] :]
        error = np.linalg.norm(reached[spec_a.layer] - wanted)
        assert error == pytest.approx(np.linalg.norm(cut), abs=1e-5)


def test_averaging_factors_would_not_have_been_the_mean_of_updates(
    layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    # The control: the short way is wrong for fedsvd, whose basis turns.
    states = history("fedsvd", layout, make_state(layout, 0), rounds=4)
    naive = {name: np.mean([state[name] for state in states], axis=0) for name in layout.names}
    wanted = mean_update(updates, layout, states)
    assert any(np.linalg.norm(updates(layout, naive)[layer] - wanted[layer]) > 0.1 for layer in wanted)


@pytest.mark.parametrize("algorithm", ["fedit", "ffa", "fedsvd"])
def test_the_head_is_averaged_plainly(algorithm: str, layout: AdapterLayout, make_state: Callable) -> None:
    states = history(algorithm, layout, make_state(layout, 0), rounds=3)
    expected = np.mean([state["score.weight"].astype(float) for state in states[-2:]], axis=0)
    np.testing.assert_allclose(averaged(layout, states, last=2)["score.weight"], expected, rtol=1e-7, atol=1e-12)


def test_a_window_of_one_releases_the_last_adapter_bit_for_bit(layout: AdapterLayout, make_state: Callable) -> None:
    states = history("fedsvd", layout, make_state(layout, 0), rounds=3)
    average = averaged(layout, states, last=1)
    assert {name: array.tobytes() for name, array in average.items()} == {
        name: array.tobytes() for name, array in states[-1].items()
    }


def test_a_study_shorter_than_the_window_averages_what_there_is(
    layout: AdapterLayout, make_state: Callable, updates: Callable
) -> None:
    states = history("fedsvd", layout, make_state(layout, 0), rounds=2)
    reached = updates(layout, averaged(layout, states, last=10))
    for layer, wanted in mean_update(updates, layout, states).items():
        np.testing.assert_allclose(reached[layer], wanted, atol=1e-5)


@pytest.mark.parametrize("stop", [1, 12])  # a full window has more ages than digits sort by text
def test_stopping_and_loading_the_window_changes_no_bit(stop: int, layout: AdapterLayout, make_state: Callable) -> None:
    states = history("fedsvd", layout, make_state(layout, 0), rounds=14)
    before = TailAverage(layout, 11)
    for state in states[:stop]:
        before.push(state)
    resumed = TailAverage(layout, 11)
    resumed.load(before.state())
    for state in states[stop:]:
        resumed.push(state)
    straight = averaged(layout, states, last=11)
    for name, array in resumed.result().items():
        assert array.tobytes() == straight[name].tobytes()


def test_an_empty_window_has_no_average(layout: AdapterLayout) -> None:
    with pytest.raises(AggregationError) as caught:
        TailAverage(layout, 3).result()
    assert caught.value.code == "aggregation.no-adapter"


def test_a_checkpoint_without_a_tensor_is_refused(layout: AdapterLayout, make_state: Callable) -> None:
    average = TailAverage(layout, 3)
    average.push(make_state(layout, 0))
    average.push(make_state(layout, 1))
    arrays = average.state()
    arrays["0/renamed"] = arrays.pop("0/score.weight")
    fewer = dict(list(arrays.items())[:-1])
    for broken in (arrays, fewer):
        with pytest.raises(AggregationError) as caught:
            TailAverage(layout, 3).load(broken)
        assert caught.value.code == "aggregation.broken-state"
