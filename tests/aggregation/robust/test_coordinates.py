from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation.robust.coordinates import mean_around_median, median, trimmed_mean

Clouds = Callable[..., np.ndarray]

counts = st.integers(1, 12)
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**32 - 1)


def naive_median(column: np.ndarray) -> float:
    values = sorted(column.tolist())
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def naive_trimmed(column: np.ndarray, attackers: int) -> float:
    values = sorted(column.tolist())
    for _ in range(attackers):
        values.remove(max(values))
        values.remove(min(values))
    return sum(values) / len(values)


def naive_around(column: np.ndarray, keep: int) -> float:
    middle = naive_median(column)
    closest = sorted(column.tolist(), key=lambda value: (abs(value - middle), value))[:keep]
    return sum(closest) / keep


@given(sites=counts, size=sizes, seed=seeds)
def test_each_rule_equals_a_loop_over_columns(sites: int, size: int, seed: int, make_cloud: Clouds) -> None:
    rows, trim, keep = make_cloud(sites, size, seed), (sites - 1) // 2, 1 + sites // 2
    columns = range(size)
    np.testing.assert_allclose(median(rows), [naive_median(rows[:, j]) for j in columns], rtol=1e-12)
    np.testing.assert_allclose(trimmed_mean(rows, trim), [naive_trimmed(rows[:, j], trim) for j in columns], atol=1e-12)
    np.testing.assert_allclose(
        mean_around_median(rows, keep), [naive_around(rows[:, j], keep) for j in columns], atol=1e-12
    )


@given(sites=counts, size=sizes, seed=seeds)
def test_any_order_of_the_sites_gives_the_same_bits(sites: int, size: int, seed: int, make_cloud: Clouds) -> None:
    # Rounded, so that there are ties and values at equal distance on both sides of the median.
    rows = np.round(make_cloud(sites, size, seed), 1)
    mixed = np.random.default_rng(seed).permutation(rows)
    for rule in (median, lambda r: trimmed_mean(r, (sites - 1) // 2), lambda r: mean_around_median(r, 1 + sites // 2)):
        assert rule(rows).tobytes() == rule(mixed).tobytes()


def test_a_negative_zero_is_a_zero_whoever_sends_it() -> None:
    rows = np.array([[-0.0], [0.0], [0.0], [-0.0]])
    for rule in (median, lambda r: trimmed_mean(r, 1), lambda r: mean_around_median(r, 2)):
        assert rule(rows).tobytes() == rule(rows[::-1]).tobytes()


@given(sites=counts, size=sizes, seed=seeds)
def test_no_attacker_to_trim_leaves_the_mean(sites: int, size: int, seed: int, make_cloud: Clouds) -> None:
    rows = make_cloud(sites, size, seed)
    np.testing.assert_allclose(trimmed_mean(rows, 0), rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(mean_around_median(rows, sites), rows.mean(0), atol=1e-12)


@given(attackers=st.integers(0, 5), more=st.integers(1, 4), size=sizes, seed=seeds, value=st.floats(-1e30, 1e30))
def test_attackers_cannot_leave_the_honest_values(
    attackers: int, more: int, size: int, seed: int, value: float, make_cloud: Clouds
) -> None:
    honest = make_cloud(attackers + more, size, seed)
    rows = np.concatenate([honest, np.full((attackers, size), value)])
    for result in (median(rows), trimmed_mean(rows, attackers)):
        assert (honest.min(0) - 1e-12 <= result).all()
        assert (result <= honest.max(0) + 1e-12).all()


@pytest.mark.parametrize("one_more", [False, True])
def test_the_median_breaks_at_half_and_not_before(one_more: bool, make_cloud: Clouds) -> None:
    # The bound f < n/2 is sharp: this is the control of the test above.
    honest = make_cloud(5, 3, seed=0)
    rows = np.concatenate([honest, np.full((5 if one_more else 4, 3), 1e6)])
    assert (np.abs(median(rows)).max() > 1e5) == one_more


def test_the_mean_around_the_median_is_no_farther_from_it_than_honest_values(make_cloud: Clouds) -> None:
    honest = make_cloud(7, 4, seed=3)
    rows = np.concatenate([honest, np.full((2, 4), 50.0)])
    middle = median(rows)
    assert (np.abs(mean_around_median(rows, 9 - 2 * 2) - middle) <= np.abs(honest - middle).max(0)).all()
