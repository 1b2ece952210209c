import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.server_optimizers import OptimizerState, apply, init
from fedtune.config.schema import AggregationSettings
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout

State = dict[str, np.ndarray]
OPTIMIZERS = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad")
ROUNDS = 5


def settings_for(optimizer: str, learning_rate: float = 0.3) -> AggregationSettings:
    return AggregationSettings(
        server_optimizer=optimizer, server_learning_rate=learning_rate, momentum=0.8, beta1=0.7, beta2=0.95, tau=0.02
    )


def run(settings: AggregationSettings, start: State, means: list[State]) -> tuple[State, OptimizerState]:
    state, memory = start, init(settings, start)
    for mean in means:
        state, memory = apply(settings, state, mean, memory)
    return state, memory


def reference_entry(settings: AggregationSettings, start: float, means: list[float]) -> float:
    """One number through the published recursions, in Python floats, rounded to float32 once a round."""
    x, m, v = start, 0.0, settings.tau**2
    for mean in means:
        delta = mean - x
        if settings.server_optimizer == "fedavg":
            step = delta
        elif settings.server_optimizer == "fedavgm":
            m = settings.momentum * m + delta
            step = m
        else:
            m = settings.beta1 * m + (1 - settings.beta1) * delta
            if settings.server_optimizer == "fedadagrad":
                v = v + delta**2
            elif settings.server_optimizer == "fedyogi":
                v = v - (1 - settings.beta2) * delta**2 * math.copysign(1, v - delta**2)
            else:
                v = settings.beta2 * v + (1 - settings.beta2) * delta**2
            step = m / (math.sqrt(v) + settings.tau)
        x = float(np.float32(x + settings.server_learning_rate * step))
    return x


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_entry_follows_the_published_recursion(
    optimizer: str, layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    settings = settings_for(optimizer)
    start, means = make_state(layout, 0), [make_state(layout, seed) for seed in range(1, ROUNDS + 1)]
    state, memory = run(settings, start, means)
    assert memory.step == ROUNDS
    for name in layout.names:
        expected = [
            reference_entry(settings, float(start[name].flat[entry]), [float(mean[name].flat[entry]) for mean in means])
            for entry in range(start[name].size)
        ]
        np.testing.assert_allclose(state[name].ravel(), expected, rtol=3e-7, atol=1e-12)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_fedavg_at_learning_rate_one_returns_the_mean_bit_for_bit(values: list[float]) -> None:
    mean = {"x": np.array(values, np.float32)}
    start = {"x": np.linspace(-1e30, 1e-30, len(values)).astype(np.float32)}
    state, _ = run(AggregationSettings(), start, [mean])
    assert state["x"].tobytes() == mean["x"].tobytes()


def test_fedavgm_without_momentum_is_fedavg(layout: AdapterLayout, make_state: Callable[..., State]) -> None:
    start, means = make_state(layout, 0), [make_state(layout, seed) for seed in (1, 2, 3)]
    plain, _ = run(settings_for("fedavg"), start, means)
    momentum, _ = run(settings_for("fedavgm").model_copy(update={"momentum": 0.0}), start, means)
    for name in layout.names:
        np.testing.assert_array_equal(plain[name], momentum[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_mean_equal_to_the_global_adapter_moves_nothing(optimizer: str) -> None:
    start = {"x": np.array([0.5, -2.0], np.float32)}
    state, _ = run(settings_for(optimizer), start, [start, start])
    np.testing.assert_array_equal(state["x"], start["x"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopping_and_reading_the_state_back_changes_no_bit(
    optimizer: str, layout: AdapterLayout, make_state: Callable[..., State]
) -> None:
    settings = settings_for(optimizer)
    start, means = make_state(layout, 0), [make_state(layout, seed) for seed in range(1, 5)]
    straight, _ = run(settings, start, means)
    state, memory = run(settings, start, means[:2])
    memory = OptimizerState.from_arrays(memory.to_arrays())
    for mean in means[2:]:
        state, memory = apply(settings, state, mean, memory)
    for name in layout.names:
        assert state[name].tobytes() == straight[name].tobytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_is_changed_in_place(optimizer: str, layout: AdapterLayout, make_state: Callable[..., State]) -> None:
    settings, start, mean = settings_for(optimizer), make_state(layout, 0), make_state(layout, 1)
    _, memory = run(settings, start, [mean])
    inputs = [*start.values(), *mean.values(), *memory.moments.values()]
    before = [array.tobytes() for array in inputs]
    apply(settings, start, mean, memory)
    assert [array.tobytes() for array in inputs] == before


def test_the_second_moment_starts_at_tau_squared_and_never_below() -> None:
    settings = settings_for("fedyogi")
    memory = init(settings, {"x": np.ones(2, np.float32)})
    np.testing.assert_array_equal(memory.moments["variance/x"], settings.tau**2)


def test_a_step_out_of_float32_is_an_error_and_not_an_infinity() -> None:
    start, mean = {"x": np.zeros(1, np.float32)}, {"x": np.full(1, 3e38, np.float32)}
    with pytest.raises(AggregationError) as caught:
        run(settings_for("fedavg", learning_rate=2.0), start, [mean])
    assert caught.value.code == "aggregation.not-finite"


def test_a_state_without_its_step_counter_is_refused() -> None:
    with pytest.raises(AggregationError) as caught:
        OptimizerState.from_arrays({})
    assert caught.value.code == "aggregation.broken-state"


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedyogi", "fedadagrad"])
def test_flowers_strategy_computes_the_same_from_the_same_start(optimizer: str) -> None:
    # Flower's FedAdagrad has no momentum and its v starts at 0: ours runs without, and its v is set to τ².
    settings = AggregationSettings(server_optimizer=optimizer, server_learning_rate=0.1, beta1=0.0)
    generator = np.random.default_rng(0)
    start = {"x": generator.standard_normal(6).astype(np.float32)}
    means = [{"x": generator.standard_normal(6).astype(np.float32)} for _ in range(3)]
    ours, _ = run(settings, start, means)
    np.testing.assert_allclose(ours["x"], flower(settings, start["x"], [mean["x"] for mean in means]), rtol=1e-5)


def flower(settings: AggregationSettings, start: np.ndarray, means: list[np.ndarray]) -> np.ndarray:
    """Drive Flower's own strategy of that name with one reply a round."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp import strategy

    rate, tau = settings.server_learning_rate, settings.tau
    chosen = {
        "fedavgm": strategy.FedAvgM(server_learning_rate=rate, server_momentum=settings.momentum),
        "fedyogi": strategy.FedYogi(eta=rate, beta_1=0.0, beta_2=settings.beta2, tau=tau),
        "fedadagrad": strategy.FedAdagrad(eta=rate, tau=tau),
    }[settings.server_optimizer]
    chosen.v_t = {"x": np.full_like(start, tau**2)}
    x = start
    for turn, mean in enumerate(means, start=1):
        chosen.current_arrays = ArrayRecord({"x": Array(x)}) if settings.server_optimizer == "fedavgm" else {"x": x}
        records = {"arrays": ArrayRecord({"x": Array(mean)}), "metrics": MetricRecord({"num-examples": 1})}
        # A Message needs a running Flower task to be made in; a strategy reads these two of it.
        reply = SimpleNamespace(content=RecordDict(records), has_error=lambda: False)
        record, _ = chosen.aggregate_train(turn, [reply])
        x = record["x"].numpy()
    return x
