import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.compression import rounding
from fedtune.errors import AggregationError
from fedtune.privacy.random import SecureSource, SeededSource

TIMES = 20_000
floats = st.floats(-60000, 60000, width=32)


def half(values: np.ndarray, source: SeededSource) -> np.ndarray:
    return rounding.to_float16(values, source).astype(float)


def brain(values: np.ndarray, source: SeededSource) -> np.ndarray:
    return rounding.from_bfloat16(rounding.to_bfloat16(values, source)).astype(float)


def whole(values: np.ndarray, source: SeededSource) -> np.ndarray:
    return rounding.to_integers(values.astype(float), source).astype(float)


ROUNDINGS = {"float16": half, "bfloat16": brain, "integers": whole}
Rounding = Callable[[np.ndarray, SeededSource], np.ndarray]


def neighbours(name: str, value: float) -> tuple[float, float]:
    """The grid points around a number, from the formats' definitions: fraction bits and smallest exponent."""
    fraction, smallest = {"float16": (10, -14), "bfloat16": (7, -126), "integers": (0, 0)}[name]
    exponent = smallest if name == "integers" or value == 0 else max(math.frexp(value)[1] - 1, smallest)
    step = 2.0 ** (exponent - fraction)
    return math.floor(value / step) * step, math.ceil(value / step) * step


@pytest.mark.parametrize("name", list(ROUNDINGS))
@given(value=floats, seed=st.integers(0, 1000))
def test_a_number_becomes_one_of_its_two_neighbours(name: str, value: float, seed: int) -> None:
    rounded = float(ROUNDINGS[name](np.array([value], np.float32), SeededSource("r", seed))[0])
    assert rounded in neighbours(name, value)


@pytest.mark.parametrize("name", list(ROUNDINGS))
@pytest.mark.parametrize("value", [0.3, -0.3, 1.0004883, -777.77, 3.1e-6, 126.999, 59999.5])
def test_the_mean_of_many_roundings_is_the_number(name: str, value: float) -> None:
    exact = float(np.float32(value))
    rounded = ROUNDINGS[name](np.full(TIMES, value, np.float32), SeededSource("mean", name))
    below, above = neighbours(name, exact)
    deviation = math.sqrt((exact - below) * (above - exact) / TIMES)
    assert abs(rounded.mean() - exact) <= 5 * deviation + 1e-12 * abs(exact)


def test_rounding_to_the_nearest_is_not_unbiased() -> None:
    # The control of the test above: it can fail.
    assert abs(np.full(TIMES, 0.3, np.float32).astype(np.float16).astype(float).mean() - np.float32(0.3)) > 1e-6


def test_a_number_on_the_grid_stays() -> None:
    numbers = np.array([0.0, -0.0, 1.0, -2.5, 127.0, 65504.0, -65504.0, 2.0**-24], np.float32)
    for turn in range(50):
        assert half(numbers, SeededSource("grid", turn)).tolist() == numbers.tolist()
    assert brain(numbers[:5], SeededSource("grid", 0)).tolist() == numbers[:5].tolist()
    assert whole(numbers[[0, 2, 4]], SeededSource("grid", 0)).tolist() == [0, 1, 127]


def test_the_largest_whole_number_never_rounds_up() -> None:
    # floor(127 + u) is 128 for u next to 1, whatever the source: the comparison is not.
    class Highest:
        name = "seeded"

        def uniform(self, n: int) -> np.ndarray:
            return np.full(n, 1 - 2.0**-53)

        def normal(self, n: int) -> np.ndarray:
            return np.zeros(n)

    assert math.floor(127 + (1 - 2.0**-53)) == 128
    assert rounding.to_integers(np.array([127.0, -127.0]), Highest()).tolist() == [127, -127]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 65505.0, -65519.0])
def test_half_precision_refuses_what_it_cannot_hold(value: float) -> None:
    with pytest.raises(AggregationError) as caught:
        rounding.to_float16(np.array([1.0, value], np.float32), SeededSource("x"))
    assert caught.value.code == "aggregation.not-finite"


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.4e38, -3.4e38])
def test_bfloat16_refuses_what_it_cannot_hold(value: float) -> None:
    with pytest.raises(AggregationError):
        rounding.to_bfloat16(np.array([value], np.float32), SeededSource("x"))
    largest = np.array([rounding.LARGEST_BFLOAT16], np.float32)
    assert brain(largest, SeededSource("x")) == largest


@given(st.floats(0, float(np.finfo(np.float32).max) * 0.99))
def test_a_scale_is_never_below_its_number_and_at_most_one_step_above(value: float) -> None:
    scale = float(rounding.from_bfloat16(rounding.bfloat16_above(np.array([value])))[0])
    assert value <= scale <= value * (1 + 2.0**-7) * (1 + 2.0**-22) + 2.0**-133
    assert (scale == 0) == (value == 0)


@pytest.mark.parametrize("name", list(ROUNDINGS))
def test_equal_streams_give_equal_bits_and_a_secret_stream_other_ones(name: str) -> None:
    numbers = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    one, other = (ROUNDINGS[name](numbers, SeededSource("round", 7)) for _ in range(2))
    assert one.tobytes() == other.tobytes()
    assert ROUNDINGS[name](numbers, SecureSource()).tobytes() != one.tobytes()
