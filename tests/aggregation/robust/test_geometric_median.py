from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.aggregation.robust.geometric_median import geometric_median

Clouds = Callable[..., np.ndarray]

seeds = st.integers(0, 2**32 - 1)


def objective(point: np.ndarray, rows: np.ndarray, shares: np.ndarray) -> float:
    return float(sum(share * np.linalg.norm(point - row) for share, row in zip(shares, rows, strict=True)))


def by_descent(rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The geometric median by another method: SciPy's general minimiser from several starts."""
    from scipy.optimize import minimize

    starts = [np.median(rows, axis=0), min(rows, key=lambda row: objective(row, rows, shares))]
    found = [minimize(objective, start, (rows, shares), method="Nelder-Mead", tol=1e-10).x for start in starts]
    return min(found, key=lambda point: objective(point, rows, shares))


def median_of(rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return geometric_median(rows @ rows.T, shares) @ rows


@settings(max_examples=15)
@given(sites=st.integers(1, 8), seed=seeds, equal=st.booleans())
def test_no_other_minimiser_finds_a_better_point(sites: int, seed: int, equal: bool, make_cloud: Clouds) -> None:
    rows = make_cloud(sites, 2, seed)
    shares = np.full(sites, 1 / sites) if equal else np.random.default_rng(seed).dirichlet(np.ones(sites))
    reached = objective(median_of(rows, shares), rows, shares)
    assert reached <= objective(by_descent(rows, shares), rows, shares) + 1e-6


def test_on_a_line_it_is_the_median() -> None:
    rows = np.array([[0.0], [1.0], [2.0], [50.0], [1000.0]])
    weights = geometric_median(rows @ rows.T, np.full(5, 0.2))
    assert float(weights @ rows[:, 0]) == pytest.approx(2.0, abs=1e-4)


@given(attackers=st.integers(0, 4), extra=st.integers(1, 4), seed=seeds, far=st.floats(0, 1e30))
def test_a_minority_moves_it_by_no_more_than_the_bound(
    attackers: int, extra: int, seed: int, far: float, make_cloud: Clouds
) -> None:
    honest = make_cloud(attackers + extra, 3, seed)
    rows = np.concatenate([honest, np.full((attackers, 3), far)])
    shares, alpha = np.full(len(rows), 1 / len(rows)), attackers / len(rows)
    centre = honest.mean(0)
    radius = max(np.linalg.norm(row - centre) for row in honest)
    moved = np.linalg.norm(median_of(rows, shares) - centre)
    assert moved <= 2 * (1 - alpha) * radius / (1 - 2 * alpha) * (1 + 1e-3) + 1e-9


@given(seed=seeds, sites=st.integers(2, 6))
def test_the_weights_are_a_permutation_equivariant_mean(seed: int, sites: int, make_cloud: Clouds) -> None:
    rows, shares = make_cloud(sites, 3, seed), np.full(sites, 1 / sites)
    gram = rows @ rows.T
    order = np.random.default_rng(seed).permutation(sites)
    weights = geometric_median(gram, shares)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    np.testing.assert_allclose(geometric_median(gram[np.ix_(order, order)], shares), weights[order], atol=1e-5)


@pytest.mark.parametrize("sites", [1, 2, 5])
def test_equal_updates_are_their_own_median(sites: int) -> None:
    weights = geometric_median(np.zeros((sites, sites)), np.full(sites, 1 / sites))
    np.testing.assert_allclose(weights, 1 / sites)


def test_a_majority_at_one_point_is_the_median() -> None:
    rows = np.array([[1.0, 1.0]] * 4 + [[1e9, -3.0], [5.0, 1e9], [0.0, 0.0]])
    np.testing.assert_allclose(median_of(rows, np.full(7, 1 / 7)), [1.0, 1.0], atol=1e-9)


def test_the_mean_is_taken_over_where_the_median_is_not(make_cloud: Clouds) -> None:
    rows = np.concatenate([make_cloud(6, 3, seed=0), np.full((4, 3), 1e6)])
    assert np.linalg.norm(rows.mean(0)) > 1e5
    assert np.linalg.norm(median_of(rows, np.full(10, 0.1))) < 10


@pytest.mark.parametrize("far", [1e3, 1e9, 1e18, 1e30])
def test_an_attacker_cannot_decide_by_rounding(far: float, make_cloud: Clouds) -> None:
    # With squared distances in place of inner products, terms of the order of `far` cancel and leave their rounding.
    rows = np.concatenate([make_cloud(9, 3, seed=0), far * make_cloud(2, 3, seed=1)])
    assert np.linalg.norm(median_of(rows, np.full(11, 1 / 11))) < 2
