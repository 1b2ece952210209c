import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.weights import site_weights
from fedtune.config.schema import AggregationSettings
from fedtune.errors import AggregationError


def test_equal_weights_are_one_nth_each() -> None:
    assert site_weights(AggregationSettings(), ["a", "b", "c", "d"]) == dict.fromkeys("abcd", 0.25)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20))
def test_fixed_weights_keep_their_ratios_in_site_order_and_sum_to_one(numbers: list[float]) -> None:
    names = [f"site-{index}" for index in range(len(numbers))]
    weights = site_weights(AggregationSettings(weights=tuple(numbers)), names)
    assert list(weights) == names
    assert math.fsum(weights.values()) == pytest.approx(1)
    for name, number in zip(names, numbers, strict=True):
        assert weights[name] * math.fsum(numbers) == pytest.approx(number)


@pytest.mark.parametrize(
    ("weights", "names", "slug"),
    [
        ((1.0, 2.0), ["a"], "weights-length"),
        ((1.0,), ["a", "b"], "weights-length"),
        ((1.0, 0.0), ["a", "b"], "bad-weight"),
        ((1.0, -2.0), ["a", "b"], "bad-weight"),
        ((1e308, 1e-308), ["a", "b"], "bad-weight"),
        ("equal", [], "no-site"),
        ("equal", ["a", "a"], "duplicate-site"),
    ],
)
def test_weights_that_do_not_fit_the_sites_are_refused(
    weights: tuple[float, ...] | Literal["equal"], names: list[str], slug: str
) -> None:
    with pytest.raises(AggregationError) as caught:
        site_weights(AggregationSettings(weights=weights), names)
    assert caught.value.code == f"aggregation.{slug}"
    assert caught.value.hint
