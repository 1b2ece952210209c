import functools
import math
import operator
import tracemalloc
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.mean import BLOCK, MAX_SITES, StreamingMean, _unit_of
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout, TensorSpec

State = dict[str, np.ndarray]
Replies = Sequence[tuple[Sequence[float], float]]

VECTOR = AdapterLayout((TensorSpec("x", (3,), "head"),))

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
weights = st.floats(min_value=1e-6, max_value=1e6)
sites = st.lists(st.tuples(st.lists(numbers, min_size=3, max_size=3), weights), min_size=1, max_size=12)


def mean_of(replies: Replies) -> np.ndarray:
    mean = StreamingMean(VECTOR)
    for values, weight in replies:
        mean.add({"x": np.array(values, np.float32)}, weight)
    return mean.result()["x"]


def exact(replies: Replies, entry: int) -> Fraction:
    total = sum(Fraction(weight) * Fraction(values[entry]) for values, weight in replies)
    return total / sum(Fraction(weight) for _, weight in replies)


@given(sites, st.randoms(use_true_random=False))
def test_any_order_of_the_sites_gives_the_same_bits(replies: Replies, random: Random) -> None:
    shuffled = random.sample(replies, len(replies))
    assert mean_of(replies).tobytes() == mean_of(shuffled).tobytes()


def test_a_plain_float64_sum_of_the_same_sites_depends_on_their_order() -> None:
    # The control: this is what the order does to a sum without the digits (`sum` compensates from Python 3.12 on).
    terms, reordered = [1e30, 1.0, -1e30], [1e30, -1e30, 1.0]
    assert functools.reduce(operator.add, terms) == 0
    assert functools.reduce(operator.add, reordered) == 1
    for order in (terms, reordered):
        assert mean_of([([term] * 3, 1.0) for term in order]).tolist() == [np.float32(1 / 3)] * 3


def assert_precise(replies: Replies) -> None:
    """What is rounded besides float32 is 2^-40 of the largest of a site's terms."""
    result = mean_of(replies)
    total = sum(weight for _, weight in replies)
    largest = sum(weight * max(map(abs, values)) for values, weight in replies) / total
    for entry in range(3):
        mean = float(exact(replies, entry))
        assert abs(float(result[entry]) - mean) <= 2.0**-24 * abs(mean) + 2.0**-39.9 * largest + rounded_off(replies)


@given(sites)
def test_the_mean_is_the_rational_mean_to_float32_precision(replies: Replies) -> None:
    assert_precise(replies)


@given(
    st.lists(st.tuples(st.lists(st.floats(-1, 1), min_size=3, max_size=3), weights), min_size=1, max_size=12),
    st.integers(-60, 60),
)
def test_the_precision_does_not_depend_on_the_scale_of_the_numbers(replies: Replies, scale: int) -> None:
    assert_precise([([float(np.float32(math.ldexp(x, scale))) for x in values], weight) for values, weight in replies])


def rounded_off(replies: Replies) -> float:
    """Return what the lowest unit, 2^-96, may round off, and float32 of its own accord below its normal numbers."""
    return 2.0**-97 * len(replies) / sum(weight for _, weight in replies) + 2.0**-149


def test_every_entry_of_a_large_adapter_equals_a_float64_reference(
    make_layout: Callable[..., AdapterLayout], make_state: Callable[..., State]
) -> None:
    layout = make_layout({"a": (4, 3000, 7), "b": (4, 5, 2000)})  # more numbers than one block
    states = [make_state(layout, seed, scale=10.0**-seed) for seed in range(5)]
    shares = [0.1, 0.2, 0.05, 0.4, 0.25]
    mean = StreamingMean(layout)
    for state, share in zip(states, shares, strict=True):
        mean.add(state, share)
    result = mean.result()
    for name in layout.names:
        reference = sum(share * state[name].astype(float) for state, share in zip(states, shares, strict=True))
        np.testing.assert_allclose(result[name], reference / sum(shares), rtol=1e-7, atol=1e-15)
        assert result[name].dtype == np.float32


def test_bug_1_of_fedit_the_mean_is_not_the_first_sites_state_when_weights_differ() -> None:
    replies = [([1.0, 0.0, -4.0], 1.0), ([3.0, 8.0, 4.0], 3.0)]
    assert mean_of(replies).tolist() == [2.5, 6.0, 2.0]


@given(
    st.lists(st.floats(2.0**-14, 1, width=32), min_size=3, max_size=3),
    st.integers(-38, 60),
    st.lists(weights, min_size=1, max_size=9),
)
def test_equal_states_average_to_themselves(values: list[float], scale: int, shares: list[float]) -> None:
    # For numbers within 2^14 of each other, whose products are above the lowest unit of 2^-96 by float32's 24 bits, the
    # mean is correctly rounded.
    expected = np.ldexp(np.array(values, np.float32), scale)
    result = mean_of([(expected, share) for share in shares])
    np.testing.assert_array_equal(result, expected)


def test_a_number_is_rounded_beside_the_largest_of_its_own_tensor_and_block_only() -> None:
    layout = AdapterLayout((TensorSpec("a", (BLOCK + 1,), "head"), TensorSpec("b", (2,), "head")))
    state = {"a": np.full(BLOCK + 1, 1e-30, np.float32), "b": np.array([1e-20, 1e20], np.float32)}
    state["a"][0] = 1e9
    mean = StreamingMean(layout)
    mean.add(state, 1.0)
    result = mean.result()
    assert (result["a"][0], result["a"][1]) == (np.float32(1e9), 0)
    assert result["a"][BLOCK] == pytest.approx(1e-30, rel=1e-1)  # of 2^-96 it is less than thirteen units
    assert result["b"].tolist() == [0, np.float32(1e20)]


@pytest.mark.parametrize("size", [2.0**-1 - 2.0**-25, 1.0, -1.0, 3.0e38, -(2.0**-10)])
def test_the_largest_terms_of_many_sites_do_not_overflow(size: float) -> None:
    mean = StreamingMean(VECTOR)
    state = {"x": np.array([size, -size, size / 3], np.float32)}
    for _ in range(5000):
        mean.add(state, 1.0)
    np.testing.assert_array_equal(mean.result()["x"], state["x"])


def test_no_scales_of_sites_below_one_need_more_than_eight_sums(
    make_layout: Callable[..., AdapterLayout], make_state: Callable[..., State]
) -> None:
    layout = make_layout({"a": (8, 500, 500)})
    state = make_state(layout, 0)
    tracemalloc.start()
    mean = StreamingMean(layout)
    for scale in range(4, 150):
        mean.add({name: np.ldexp(array, -scale) for name, array in state.items()}, 1.0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held <= 8 * 8 * layout.size + 2**19


def test_as_many_sites_as_are_allowed_fit_into_an_int64_at_their_largest() -> None:
    most = max(size / 2.0 ** _unit_of(size) for size in (math.ldexp(1 - 2.0**-53, at) for at in range(-40, 40)))
    assert (most + 1) * MAX_SITES < 2**63


def test_memory_does_not_grow_with_the_number_of_sites(
    make_layout: Callable[..., AdapterLayout], make_state: Callable[..., State]
) -> None:
    layout = make_layout({"a": (8, 500, 500)})
    states = [make_state(layout, seed, scale=0.01) for seed in range(3)]
    mean = StreamingMean(layout)
    for state in states:
        mean.add(state, 1 / 3)
    tracemalloc.start()
    for turn in range(300):
        mean.add(states[turn % 3], 1 / 3)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mean.count == 303
    assert grown < layout.size  # bytes: less than a quarter of one state


def test_count_and_weight_say_what_went_in() -> None:
    mean = StreamingMean(VECTOR)
    for weight in (0.1, 0.2, 0.3):
        mean.add({"x": np.zeros(3, np.float32)}, weight)
    assert mean.count == 3
    assert mean.weight == math.fsum([0.1, 0.2, 0.3])


def test_the_mean_of_no_site_is_an_error() -> None:
    with pytest.raises(AggregationError) as caught:
        StreamingMean(VECTOR).result()
    assert caught.value.code == "aggregation.no-site"


GOOD = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("state", "weight", "slug"),
    [
        ({"x": GOOD}, 0.0, "bad-weight"),
        ({"x": GOOD}, -1.0, "bad-weight"),
        ({"x": GOOD}, math.nan, "bad-weight"),
        ({"x": GOOD}, math.inf, "bad-weight"),
        ({}, 1.0, "wrong-state"),
        ({"x": np.ones((3, 1), np.float32)}, 1.0, "wrong-state"),
        ({"x": np.ones(3)}, 1.0, "wrong-state"),
        ({"x": np.array([1, math.nan, 1], np.float32)}, 1.0, "not-finite"),
        ({"x": np.array([1, -math.inf, 1], np.float32)}, 1.0, "not-finite"),
    ],
)
def test_a_refused_state_leaves_the_mean_as_it_was(state: State, weight: float, slug: str) -> None:
    mean = StreamingMean(VECTOR)
    mean.add({"x": GOOD}, 0.5)
    with pytest.raises(AggregationError) as caught:
        mean.add(state, weight)
    assert caught.value.code == f"aggregation.{slug}"
    assert (mean.count, mean.weight) == (1, 0.5)
    np.testing.assert_array_equal(mean.result()["x"], GOOD)


@given(sites, sites, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_a_refused_state_had_added_before_it_was_refused_is_gone_to_the_last_bit(
    replies: Replies, refused: Replies, bad: float
) -> None:
    layout = AdapterLayout((TensorSpec("a", (3,), "head"), TensorSpec("b", (3,), "head")))
    mean, clean = StreamingMean(layout), StreamingMean(layout)
    for values, weight in replies:
        numbers = np.array(values, np.float32)
        for one in (mean, clean):
            one.add({"a": numbers, "b": 2 * (numbers / 4)}, weight)
        for others, other_weight in refused:
            with pytest.raises(AggregationError):
                mean.add({"a": np.array(others, np.float32), "b": np.array([0, bad, 1], np.float32)}, other_weight)
    for name in layout.names:
        assert mean.result()[name].tobytes() == clean.result()[name].tobytes()


def test_the_result_does_not_change_when_another_site_is_added_later() -> None:
    mean = StreamingMean(VECTOR)
    mean.add({"x": GOOD}, 1.0)
    before = mean.result()["x"]
    mean.add({"x": 3 * GOOD}, 1.0)
    np.testing.assert_array_equal(before, GOOD)
    np.testing.assert_array_equal(mean.result()["x"], 2 * GOOD)
